"""Rendered clips as latents on disk: encoding costs more than a training step, so it is done once."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.integrity import sha256
from vgen.toyland.renderer import render
from vgen.toyland.scene import Clip, sample_clips
from vgen.training import codec

logger = logging.getLogger(__name__)

SHARD_CLIPS = 128


@dataclass(frozen=True, kw_only=True)
class LatentSet:
    """Clips of one length and size with their raw latents (not normalised)."""

    clips: list[Clip]
    latents: Tensor
    """bfloat16 [N, C, T, h, w]."""
    coverage: Tensor
    """bfloat16 [N, T, h, w]: the share of each latent pixel that subjects cover, at most over its frames."""


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLWan, clips: list[Clip], num_frames: int, height: int, width: int
) -> dict[str, Tensor]:
    """Return the raw latents [N, C, T, h, w] and the subjects' coverage [N, T, h, w] of rendered `clips`, bfloat16."""
    rendered = render(clips, num_frames=num_frames, height=height, width=width, device=vae.device)
    covered = rendered.masks.sum(1, dtype=torch.float32).clamp(max=255) / 255  # [N, F, H, W]
    covered = nn.functional.pad(covered, (0, 0, 0, 0, vae.config.scale_factor_temporal - 1, 0))  # the first is alone
    spatial = vae.config.scale_factor_spatial
    covered = nn.functional.avg_pool2d(covered, spatial)
    coverage = covered.reshape(len(clips), -1, vae.config.scale_factor_temporal, *covered.shape[2:]).amax(2)
    return {"latents": codec.encode(vae, rendered.frames), "coverage": coverage.to("cpu", torch.bfloat16)}


def require_made_by(vae: Path, cache: Path) -> None:
    """Note in the folder `cache` which VAE it was made by; raise `VgenError` where it was made by another."""
    made_by = {"vae": sha256(vae / "diffusion_pytorch_model.safetensors")}
    card = cache / "vae.json"
    if card.exists() and json.loads(card.read_text()) != made_by:
        raise VgenError(f"What {cache} holds went through another VAE.", tip="choose another --output.")
    cache.mkdir(parents=True, exist_ok=True)
    card.write_text(json.dumps(made_by))


def latent_set(
    folder: Path, vae: AutoencoderKLWan, *, count: int, num_frames: int, height: int, width: int
) -> LatentSet:
    """Return `count` clips with their latents, encoding what `folder` lacks; each shape has clips of its own."""
    shape = f"{num_frames}x{height}x{width}"
    cache = folder / f"latents-{shape}"
    cache.mkdir(parents=True, exist_ok=True)
    clips = list(islice(sample_clips(random.Random(shape).getrandbits(31)), count))
    shards = []
    for index, start in enumerate(range(0, count, SHARD_CLIPS)):
        path, batch = cache / f"{index:05d}.safetensors", clips[start : start + SHARD_CLIPS]
        kept = load_file(path) if path.exists() else {}
        if not kept or len(kept["latents"]) < len(batch):
            size = max(1, 8 * 128 * 128 // (height * width))
            parts = [
                encode_clips(vae, batch[at : at + size], num_frames, height, width)
                for at in range(0, len(batch), size)
            ]
            kept = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            save_file(kept, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
            logger.info("%s: %d of %d clips rendered and encoded", shape, min(start + SHARD_CLIPS, count), count)
        shards.append({name: value[: len(batch)] for name, value in kept.items()})
    return LatentSet(clips=clips, **{name: torch.cat([shard[name] for shard in shards]) for name in shards[0]})


def latent_statistics(latents: Tensor) -> dict[str, list[float]]:
    """Return `latents_mean` and `latents_std` as a VAE's config has them: each channel's mean, and what divides it.

    Over all channels the normalised latents have unit variance. Channels are divided by the square root of their
    standard deviation, not by all of it: those that carry little stay small, so that the loss spends itself on those
    that carry much.
    """
    channels = latents.float().transpose(0, 1).flatten(1)
    mean, deviation = channels.mean(1), channels.std(1).clamp(min=1e-3)
    divisor = deviation.sqrt()
    scale = (channels.sub(mean[:, None]) / divisor[:, None]).square().mean().sqrt()
    return {"latents_mean": mean.tolist(), "latents_std": (divisor * scale).tolist()}
