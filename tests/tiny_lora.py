"""Small random LoRAs, made by peft, in the layouts that people have them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# Of Wan: diffusers' names of layers and those of the original code.
WAN_NAMES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
LAYOUTS = ("diffusers", "bare", "peft", "comfyui", "lightx2v", "musubi")
ALPHA = 2.0


def matrices(
    model: Any, layers: Sequence[str] = tuple(WAN_NAMES), *, rank: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """Return `LAYER.lora_A.weight` and `LAYER.lora_B.weight` of an adapter on all layers that end so."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers), init_lora_weights=False)
    state = get_peft_model_state_dict(inject_adapter_in_model(config, model))
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(tensor.shape, generator=generator) / 8 for key, tensor in sorted(state.items())}


def wan(folder: Path, **options: Any) -> dict[str, Tensor]:
    """Return the matrices of a LoRA on the Wan checkpoint in a folder."""
    from diffusers import WanTransformer3DModel

    return matrices(WanTransformer3DModel.from_pretrained(folder / "transformer"), **options)


def save(path: Path, tensors: Mapping[str, Tensor], layout: str = "diffusers") -> Path:
    """Write the matrices of a Wan LoRA to `path` in one of `LAYOUTS` and return it.

    Those of musubi have an alpha; those of LightX2V have changes of norms and biases, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in _laid_out(tensors, layout).items()}, path)
    return path


def change(tensors: Mapping[str, Tensor], layer: str, layout: str = "diffusers") -> Tensor:
    """Return what the LoRA adds to the weight of a layer."""
    down, up = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
    return up @ down * (ALPHA / down.shape[0] if layout == "musubi" else 1)


def layers_of(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted({key.partition(".lora_")[0] for key in tensors})


def _laid_out(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    prefixes = {"diffusers": "transformer.", "bare": "", "peft": "base_model.model."}
    if layout in prefixes:
        return {prefixes[layout] + key: tensor for key, tensor in tensors.items()}
    renamed = {}
    for key, tensor in tensors.items():
        for ours, original in WAN_NAMES.items():
            key = key.replace(f".{ours}.", f".{original}.")
        renamed[key] = tensor
    if layout == "comfyui":
        return {f"diffusion_model.{key}": tensor for key, tensor in renamed.items()}
    renamed = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for key, t in renamed.items()}
    if layout == "lightx2v":
        made = {f"diffusion_model.{key}": tensor for key, tensor in renamed.items()}
        made["diffusion_model.blocks.0.self_attn.norm_q.diff"] = torch.zeros(24)
        made["diffusion_model.blocks.0.self_attn.q.diff_b"] = torch.full((24,), 0.25)
        return made
    made = {}
    for key, tensor in renamed.items():
        layer, _, matrix = key.partition(".lora_")
        made[f"lora_unet_{layer.replace('.', '_')}.lora_{matrix}"] = tensor
        made[f"lora_unet_{layer.replace('.', '_')}.alpha"] = torch.tensor(ALPHA)
    return made
