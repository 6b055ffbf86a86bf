"""LoRAs on a model: read by diffusers' own converters, compared with the model before it is loaded, and merged."""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vgen.backbones.components import component_config, model_index
from vgen.checkpoints import Checkpoint
from vgen.errors import CheckpointError, first_line
from vgen.loras import Lora

# Family -> the part of its stock pipelines that reads LoRAs, of diffusers' own layout and of others.
LOADERS = {
    "wan": "WanLoraLoaderMixin",
    "hunyuan-video": "HunyuanVideoLoraLoaderMixin",
    "cogvideox": "CogVideoXLoraLoaderMixin",
    "ltx-video": "LTXVideoLoraLoaderMixin",
    "ltx-2": "LTX2LoraLoaderMixin",
}

# What LoRAs change besides the transformer, of families that have it; its layers are named by it.
CONNECTORS = "connectors"

# Weights and biases that are given whole, not as low ranks. What of it goes with a LoRA layer is read as its bias.
_WHOLE = (".diff", ".diff_b", ".diff_m")


def check(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with its LoRAs telling how many of their layers its model has, and which it has not.

    The shapes are those of the model's class with the checkpoint's configuration, so that no weights are loaded.
    Raises `CheckpointError` for a LoRA none of whose layers the model has, or whose layers have other sizes.
    """
    if not checkpoint.loras:
        return checkpoint
    shapes = functools.cache(functools.partial(_layers, checkpoint))
    checked = []
    for lora in checkpoint.loras:
        layers = shapes(lora.component)
        if any(layer.startswith(f"{CONNECTORS}.") for layer in _by_layer(_read(checkpoint, lora)[0])):
            layers = {**layers, **shapes(CONNECTORS)}
        checked.append(_compared(checkpoint, lora, layers))
    return replace(checkpoint, loras=tuple(checked))


def merge(model: Any, checkpoint: Checkpoint, component: str) -> None:
    """Add a checkpoint's LoRAs to the weights of one of its components: W + sum of scale * alpha / rank * B A.

    They are loaded as diffusers loads them, as peft's adapters, then summed in float32 and rounded to the model's
    dtype once for all of them, and the adapters are taken off: inference is as fast as without, and whatever else is
    done with the model sees an unmodified one. In float32 this is what adapters give, up to the order of summation;
    in bfloat16 a weight keeps its 8 bits, so that a change below 2^-9 of it is lost, as in any file that a LoRA was
    merged into. Where the scale is 0 the weights stay as they are.
    """
    prefix = component if component == CONNECTORS else "transformer"
    layers = {f"{prefix}.{name}" for name, _ in model.named_modules()}
    adapters: dict[str, dict[str, Tensor]] = {}
    scales = []
    for lora in checkpoint.loras:
        if not lora.scale or component not in (lora.component, CONNECTORS):
            continue
        tensors, metadata = _read(checkpoint, lora)
        mine = {key: tensor for key, tensor in tensors.items() if _layer(key) in layers}
        if not mine:
            continue
        told = metadata if metadata and any(key.startswith(f"{prefix}.") for key in metadata) else None
        adapter = f"lora_{len(adapters)}"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            model.load_lora_adapter(dict(mine), prefix=prefix, adapter_name=adapter, metadata=told)
        adapters[adapter] = {key.removeprefix(f"{prefix}."): tensor for key, tensor in mine.items()}
        scales.append(lora.scale)
    if adapters:
        model.set_adapters(list(adapters), scales)
        _merge_adapters(model, adapters)
        model.unload_lora()


def _merge_adapters(model: nn.Module, adapters: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Add the change of each adapter to the weights.

    `adapters` has the tensors of each by name in the model, as peft has rounded its own to the model's dtype.
    """
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        weight = base.weight.data.float()
        for adapter, tensors in adapters.items():
            if adapter not in layer.lora_A:
                continue
            for matrix in ("lora_A", "lora_B"):
                own = getattr(layer, matrix)[adapter].float()
                own.load_state_dict(_of_matrix(tensors, f"{name}.{matrix}."), strict=False)
            weight = weight + layer.get_delta_weight(adapter)
            if layer.lora_bias[adapter]:
                change = layer.lora_B[adapter].bias.data * layer.scaling[adapter]
                bias = change if base.bias is None else base.bias.data.float() + change
                base.bias = nn.Parameter(bias.to(base.weight.dtype), requires_grad=False)
        base.weight.data = weight.to(base.weight.dtype)


def _of_matrix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _read(checkpoint: Checkpoint, lora: Lora) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return what diffusers makes of a file: tensors by `transformer.LAYER.lora_A.weight`, and peft's settings."""
    from diffusers.loaders import lora_pipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    path = lora.path
    assert path is not None, "fetched before"
    loader = getattr(lora_pipeline, LOADERS[checkpoint.family])
    try:
        tensors, metadata = loader.lora_state_dict(
            str(path.parent),
            weight_name=path.name,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
        )
        tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
        if not any("lora_A" in key for key in tensors):
            tensors = convert_unet_state_dict_to_peft(tensors)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"diffusers cannot read the LoRA {path} as one of the family {checkpoint.family}: {first_line(error)}",
            tip=_OTHER,
        ) from error
    if not any(key.startswith(("transformer.", f"{CONNECTORS}.")) for key in tensors):
        # Saved from a transformer alone.
        tensors = {f"transformer.{key}": tensor for key, tensor in tensors.items()}
        metadata = metadata and {f"transformer.{key}": value for key, value in metadata.items()}
    return tensors, metadata


def _layers(checkpoint: Checkpoint, component: str) -> dict[str, tuple[int, ...]]:
    """Return the weights' shapes of the layers that LoRAs may change, by `transformer.LAYER`."""
    library, class_name = model_index(checkpoint)[component]
    module = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    model_class = getattr(importlib.import_module(module), class_name)
    with torch.device("meta"):
        model = model_class.from_config(component_config(checkpoint, component))
    prefix = component if component == CONNECTORS else "transformer"
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {f"{prefix}.{name}": tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, kinds)}


def _compared(checkpoint: Checkpoint, lora: Lora, layers: Mapping[str, tuple[int, ...]]) -> Lora:
    """Return the LoRA with its report. `layers` are those of the model."""
    tensors, _ = _read(checkpoint, lora)
    if alphas := [key for key in tensors if key.endswith(".alpha")]:
        raise CheckpointError(
            f"The LoRA {lora.name} has scales of its own ({alphas[0]}) in a layout that diffusers does not read.",
            tip="ask for it in diffusers' layout.",
        )
    by_layer = _by_layer(tensors)
    matched = [layer for layer in by_layer if layer in layers]
    if not matched:
        raise CheckpointError(
            f'The LoRA {lora.name} is for another model: of its {len(by_layer)} layers "{checkpoint.name}" has none. '
            f"The LoRA's are called like {_bare(min(by_layer, default='?'))}, the model's like {_bare(min(layers))}.",
            tip=_OTHER,
        )
    for layer in matched:
        down, up = by_layer[layer].get("lora_A.weight"), by_layer[layer].get("lora_B.weight")
        if down is None or up is None:
            if "lora_B.bias" in by_layer[layer] and down is up:
                continue
            raise CheckpointError(f"The LoRA {lora.name} is incomplete: {_bare(layer)} has one of two matrices.")
        shape = (up.shape[0], *down.shape[1:])
        if shape != layers[layer] or up.shape[1] != down.shape[0]:
            raise CheckpointError(
                f"The LoRA {lora.name} is for another model: its {_bare(layer)} changes {_size(shape)}, but that of "
                f'"{checkpoint.name}" has {_size(layers[layer])}.',
                tip=_OTHER,
            )
    unmatched = [_bare(layer) for layer in by_layer if layer not in layers] + _left_out(lora)
    return replace(
        lora, num_layers=len(matched) + len(unmatched), matched=len(matched), unmatched=tuple(sorted(unmatched))
    )


def _left_out(lora: Lora) -> list[str]:
    """Return what a file gives whole, without a low rank beside it: diffusers leaves it out, as it is often zero."""
    from safetensors import safe_open

    assert lora.path is not None
    with safe_open(lora.path, framework="pt") as file:
        keys = list(file.keys())
    low_rank = {key.rpartition(".lora")[0] for key in keys if ".lora" in key}
    # diffusers reads this one, of LightX2V's distilled LoRAs, as a low rank.
    low_rank.add("diffusion_model.head.head")
    return [key for key in keys if key.endswith(_WHOLE) and key.rpartition(".")[0] not in low_rank]


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return a LoRA's tensors by layer, then by `lora_A.weight`, `lora_B.weight` and `lora_B.bias`."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layers.setdefault(_layer(key), {})[key[len(_layer(key)) + 1 :]] = tensor
    return layers


def _layer(key: str) -> str:
    return key.partition(".lora_")[0]


def _bare(layer: str) -> str:
    return layer.removeprefix("transformer.")


def _size(shape: tuple[int, ...]) -> str:
    """Return a layer's size for people, from inputs to outputs."""
    return f"{math.prod(shape[1:])} to {shape[0]}"


_OTHER = "look on its card which model it was made for; vgen models list tells those that have a name."
