"""Models whose linear layers stay on the disk: each weight is in memory for as long as it is multiplied.

It is what quantizing a model takes that is larger than the memory. The layers that are to be quantized are most of its
weights; norms, embeddings and biases are few and stay in memory. diffusers' own loader puts the layers in place, asked
by a quantizer, as it does for quantized ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from vgen.quantization.loading import Method


class StreamedLinear(nn.Module):
    """Takes the place of `nn.Linear`: `weight` [N, K] is read anew, in a dtype, each time that it is asked for."""

    def __init__(self, in_features: int, out_features: int, *, file: Path, key: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.file, self.key, self.dtype = file, key, dtype
        self.bias: nn.Parameter | None = None

    @property
    def weight(self) -> Tensor:
        """The weight, on the CPU."""
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as stored:
            return stored.get_tensor(self.key).to(self.dtype)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N] of inputs [..., K]."""
        return nn.functional.linear(x, self.weight.to(x.device), self.bias)


class StreamingConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Which layers of a model stay on the disk, `files` by the names of their weights, and the dtype they run in."""

    to_diff_dict = QuantizationConfigMixin.to_dict  # no value has a default to leave out

    def __init__(self, *, files: Mapping[str, Path], dtype: torch.dtype) -> None:
        self.quant_method = Method.STREAMED
        self.files = {key: str(file) for key, file in files.items()}
        self.dtype = str(dtype).removeprefix("torch.")


class StreamingQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Puts `StreamedLinear` where the configuration says, and keeps their weights from being loaded."""

    use_keep_in_fp32_modules = True
    is_serializable = False  # it lacks weights
    is_trainable = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for key, file in self.quantization_config.files.items():
            name = key.removesuffix(".weight")
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear), "the files are the model's"
            made = StreamedLinear(
                linear.in_features,
                linear.out_features,
                file=Path(file),
                key=key,
                dtype=getattr(torch, self.quantization_config.dtype),
            )
            made.bias = linear.bias
            model.set_submodule(name, made)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Return the names of what is loaded."""
        return [key for key in loaded_keys if key not in self.quantization_config.files]

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return what is loaded of a file."""
        return {key: tensor for key, tensor in state_dict.items() if key not in self.quantization_config.files}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model
