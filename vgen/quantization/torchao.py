"""Layers of 8 bits in torchao's layout, so that stock diffusers loads them by its `TorchAoConfig`.

A safetensors file holds torchao's tensors taken apart, `_weight_qdata` and `_weight_scale` in the place of `weight`,
and in its header what to put together of them (torchao.prototype.safetensors, which diffusers reads with torchao 0.16
and later). torchao is not needed to write or to read it here. What its int8 tensors have no place for is a rotation of
the inputs, packed int4 with int8 activations, and groups within one integer product.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vgen.quantization.scheme import LayerFormat

METHOD = "torchao"  # the name in config.json
NAMES = {"weight": "_weight_qdata", "scale": "_weight_scale"}  # of a quantized layer's buffers


def carries(formats: Iterable[LayerFormat]) -> bool:
    """Return whether torchao has a tensor for each of these: int8 weights, one scale per channel, nothing balanced."""
    return all(format.weight_bits == 8 and not format.group and not format.balanced for format in formats)


def config(format: LayerFormat) -> dict[str, Any]:
    """Return what config.json says under `quantization_config` of a model whose layers have a format."""
    shared = {"set_inductor_config": True, "granularity": _row(_version=1)}
    quant_type = (
        {
            "_type": "Int8DynamicActivationInt8WeightConfig",
            "_version": 2,
            "_data": {
                "act_mapping_type": _SYMMETRIC,
                "weight_only_decode": False,
                "reduce_range": False,
                **shared,
            },
        }
        if format.activation_bits == 8
        else {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"group_size": None, **shared}}
    )
    return {"quant_method": METHOD, "quant_type": {"default": quant_type}}


def flattened(
    state: Mapping[str, Tensor], formats: Mapping[str, LayerFormat], dtype: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a state dict by torchao's names, and the file's header; `formats` are by layers' names.

    The scale becomes [N, 1]. `dtype` ("bfloat16", ...) is what the layers return.
    """
    tensors: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    for key, tensor in state.items():
        layer, _, name = key.rpartition(".")
        if layer not in formats or name not in NAMES:
            tensors[key] = tensor
            told[key] = {"_type": "Tensor"}
            continue
        tensors[f"{layer}.{NAMES[name]}"] = tensor[:, None] if name == "scale" else tensor
        if name == "weight":
            told[key] = _tensor(tensor.shape[1], formats[layer], dtype)
    header = {key: json.dumps(entry) for key, entry in told.items()}
    return tensors, {"format": "pt", "tensor_names": json.dumps(list(told)), **header}


def plain_name(key: str) -> str:
    """Return the name that a tensor has in `QuantizedLinear`, for its name in a file; others stay."""
    for name, stored in NAMES.items():
        if key.endswith(f".{stored}"):
            return key.removesuffix(stored) + name
    return key


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `flattened` was given."""
    scale = f".{NAMES['scale']}"
    return {plain_name(key): tensor[:, 0] if key.endswith(scale) else tensor for key, tensor in state.items()}


_SYMMETRIC = {"_type": "MappingType", "_data": "SYMMETRIC"}


def _row(**version: int) -> dict[str, Any]:
    return {"_type": "PerRow", **version, "_data": {"dim": -1}}


def _tensor(in_features: int, format: LayerFormat, dtype: str) -> dict[str, Any]:
    data: dict[str, Any] = {
        "block_size": [1, in_features],
        "dtype": {"_type": "torch.dtype", "_data": dtype},
        "reduce_range": False,
    }
    if format.activation_bits == 8:
        activations = {"granularity": _row(), "mapping_type": _SYMMETRIC, "reduce_range": False}
        data["act_quant_kwargs"] = {"_type": "QuantizeTensorToInt8Kwargs", "_data": activations}
    return {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale"]}
