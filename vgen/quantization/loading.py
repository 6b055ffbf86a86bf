"""How diffusers' own loader learns to load a model that vgen has quantized.

diffusers asks a quantizer, by the method that config.json names, to put its layers in place before the weights arrive.
This is that quantizer, so that dtypes, shards and missing weights are handled as for any other model. Of a folder in
torchao's layout it takes the place of diffusers' own, which needs torchao; any other a diffusers without vgen refuses,
for it does not know the method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from vgen.quantization import torchao
from vgen.quantization.linear import QuantizedLinear
from vgen.quantization.scheme import LayerFormat


class Method(StrEnum):
    """The name in config.json, or of what is loaded in another way than it is stored."""

    VGEN = "vgen"
    STREAMED = "vgen-streamed"


class VgenQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says under `quantization_config`: the format's version, the scheme, each layer's format.

    In torchao's layout it is what `vgen` has there, beside torchao's own.
    """

    to_diff_dict = QuantizationConfigMixin.to_dict  # no value has a default to leave out

    def __init__(self, **values: Any) -> None:
        self.quant_method = Method.VGEN
        values = values.get("vgen", values)
        self.format: int = values["format"]
        self.scheme: str = values["scheme"]
        self.layers: dict[str, dict[str, Any]] = values["layers"]


class VgenQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Puts `QuantizedLinear` where the configuration says."""

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name, values in self.quantization_config.layers.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear), "the configuration and the class are the parent's"
            format = LayerFormat(**values)
            made = QuantizedLinear(linear.in_features, linear.out_features, format, bias=linear.bias is not None)
            model.set_submodule(name, made)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Return the names that a file's tensors have here."""
        return [torchao.plain_name(key) for key in loaded_keys]

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a file's tensors by these names."""
        return torchao.plain(state_dict)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Return whether a tensor is a buffer of a quantized layer, which keeps its dtype."""
        parent, _, name = param_name.rpartition(".")
        return name != "bias" and parent in self.quantization_config.layers

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put a tensor in place as it was stored: the loader's has been cast to the model's dtype."""
        parent, _, name = param_name.rpartition(".")
        setattr(model.get_submodule(parent), name, state_dict[param_name].to(target_device))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model


@contextmanager
def known(method: str = Method.VGEN.value) -> Iterator[None]:
    """Let diffusers load what names a method in its configuration by this quantizer, and no longer than that."""
    with registered(Method.VGEN, VgenQuantizer, {method: VgenQuantizationConfig}):
        yield


@contextmanager
def registered(
    method: Method, quantizer: type[DiffusersQuantizer], configs: Mapping[str, type[QuantizationConfigMixin]]
) -> Iterator[None]:
    """Let diffusers find a quantizer by its method, and configurations by the methods that these are for."""
    both = (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, configs), (auto.AUTO_QUANTIZER_MAPPING, {method.value: quantizer})
    before = [dict(mapping) for mapping, _ in both]
    for mapping, ours in both:
        mapping.update(ours)
    try:
        yield
    finally:
        for (mapping, _), were in zip(both, before, strict=True):
            mapping.clear()
            mapping.update(were)
