"""How given images reach a Wan model: as known latents, or as channels beside the latents and embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.backbones.components import pixels_of
from vgen.conditioning.frames import GivenImages


@dataclass(frozen=True, kw_only=True)
class WanImageInputs:
    """Images as an image-to-video model takes them.

    channels [1, r + C, T, h, w]: for each of the r frames of a latent frame whether it is given, and the latents of
    the given frames in a grey video. embeddings [1, L, D] are the image encoder's; None where the model has none.
    """

    channels: Tensor
    embeddings: Tensor | None


def grey_video(images: GivenImages, num_frames: int) -> Tensor:
    """Return pixels float32 [1, 3, F, H, W] that are the given images and 0, which is grey, between and after them."""
    first = pixels_of(images.first)
    video = first.new_zeros(*first.shape[:2], num_frames, *first.shape[3:])
    video[:, :, :1] = first
    if images.last is not None:
        video[:, :, -1:] = pixels_of(images.last)
    return video


def given_channels(images: GivenImages, num_frames: int, latents: Tensor, frames_per_latent: int) -> Tensor:
    """Return 1 where a frame is given and else 0, as channels [1, r, T, h, w] beside `latents` [1, C, T, h, w].

    Channel i of latent frame t stands for frame r (t - 1) + 1 + i; all of the first one stand for frame 0.
    """
    given = latents.new_zeros(num_frames)
    given[0] = 1
    if images.last is not None:
        given[-1] = 1
    given = torch.cat([given[:1].expand(frames_per_latent - 1), given])
    channels = given.view(-1, frames_per_latent).T[None, :, :, None, None]
    return channels.expand(-1, -1, -1, *latents.shape[3:])
