"""A VAE as training data goes through it: in bfloat16 and channels last, which halves a CPU's time under autocast."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from vgen.backbones.components import frames_of, pixels_of


def load_codec(folder: Path, device: torch.device | str = "cpu") -> AutoencoderKLWan:
    """Return the VAE in `folder`, in bfloat16, its kernels laid out as `encode` and `decode` lay out what they get."""
    vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.bfloat16).to(device).eval()
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.data = channels_last(module.weight.data)
    assert isinstance(vae, AutoencoderKLWan)
    return vae


def channels_last(values: Tensor) -> Tensor:
    """Return [B, C, H, W] or [B, C, T, H, W] with the channels next to each other in memory."""
    return values.contiguous(memory_format=torch.channels_last if values.ndim == 4 else torch.channels_last_3d)


@torch.no_grad()
def encode(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """Return the raw latents [B, C, T, h, w], bfloat16 on the CPU, of frames uint8 [B, F, H, W, 3]."""
    pixels = pixels_of(frames.to(vae.device)).to(vae.dtype)
    latents: Tensor = vae.encode(channels_last(pixels)).latent_dist.mode()
    return latents.to("cpu", torch.bfloat16).contiguous()


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return frames uint8 [B, F, H, W, 3] on the CPU of raw latents [B, C, T, h, w]."""
    return frames_of(vae.decode(channels_last(latents.to(vae.device, vae.dtype))).sample).cpu()
