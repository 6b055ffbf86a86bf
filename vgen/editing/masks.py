"""Where an edit may change a clip: given by the user, or found where two prompts disagree; with a soft border."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vgen.editing import footage
from vgen.errors import UsageError
from vgen.sampling.flow import Velocity

if TYPE_CHECKING:
    from vgen.editing.footage import Footage

AUTO, NONE = "auto", "none"
# Noise levels at which the velocities are compared, and how often at each: where a model still decides what is where.
SIGMAS, DRAWS = (0.75, 0.9), 1
# Of the largest difference (its 99th percentile), beyond the median: from here on it is a difference. On eight clips
# of Toyland edits were read as well with 0.5 as with 0.2, and the background was 5 dB nearer; 0.65 cut an edit off.
THRESHOLD = 0.5
# From such a median on it is no matter of places. It was 0.37 and 0.57 for another scene, 0.03 to 0.18 for a subject.
EVERYWHERE = 0.28
BORDER = 8  # pixels over which a mask fades out: about a latent cell


def read(path: Path, clip: Footage, *, start: float, seconds: float | None) -> NDArray[np.float32]:
    """Return a mask [F or 1, H, W] from 0 to 1, white where the clip is to be edited; a picture or a video.

    Raises `UsageError` for one of another size or length than the clip, and one that is black all over.
    """
    if path.is_dir() or path.suffix.lower() in footage.IMAGES:
        found = footage.read(path)
    else:
        found = footage.read(path, start=start, seconds=seconds)
    if found.size != clip.size:
        sizes = ["{}x{}".format(*one) for one in (found.size, clip.size)]
        raise UsageError(f"The mask {path} is {sizes[0]} and the clip {sizes[1]}.", tip="give one of the clip's size.")
    if len(found.frames) not in (1, len(clip.frames)):
        raise UsageError(
            f"The mask {path} has {len(found.frames)} frames and the clip {len(clip.frames)}.",
            tip="give as many, or one picture for all.",
        )
    mask: NDArray[np.float32] = found.frames.mean(-1, dtype=np.float32) / 255
    if mask.max() < 0.5:
        raise UsageError(f"The mask {path} is black all over.", tip="make it white where the clip is to be edited.")
    return mask


def difference(source: Velocity, target: Velocity, data: Tensor, noise: Callable[[], Tensor]) -> Tensor:
    """Return how much two velocities differ around data [1, C, T, h, w]: [T, h, w], 1 for (nearly) the most.

    The mean over noise levels and draws of noise, as DiffEdit's mask is (Couairon et al. 2022, arXiv:2210.11427).
    """
    total = torch.zeros_like(data[0, 0])
    for level in SIGMAS:
        sigma = torch.tensor(level)
        for _ in range(DRAWS):
            noisy = (1 - sigma) * data + sigma * noise()
            total += (target(noisy, sigma) - source(noisy, sigma)).square().mean(1)[0].sqrt()
    smooth = nn.functional.avg_pool2d(total[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]
    return (smooth / smooth.flatten().quantile(0.99).clamp(min=1e-6)).clamp(0, 1)


def from_difference(found: Tensor) -> Tensor:
    """Return the latent mask float [1, 1, T, h, w] of a `difference`: where it is large.

    All of the video where half of it differs much: then the prompts are of two places, and not of two subjects.
    """
    median = found.median()  # a little of a difference is everywhere, and no place
    if median > EVERYWHERE:
        return torch.ones_like(found)[None, None]
    return (found - median > THRESHOLD * (1 - median)).float()[None, None]


def to_latents(mask: NDArray[np.float32], shape: tuple[int, int, int]) -> Tensor:
    """Return a mask [F, H, W] of a view as float [1, 1, T, h, w]: 1 where any pixel of a latent cell may change.

    The first latent frame stands for the first frame, each one after it for an equal share of the rest.
    """
    num_latent_frames, height, width = shape
    frames = torch.from_numpy(mask)[:, None]
    cells = nn.functional.adaptive_max_pool2d(frames, (height, width))[:, 0]
    first, rest = cells[:1], cells[1:]
    if num_latent_frames == 1:
        return cells.amax(0)[None, None, None]
    rest = nn.functional.adaptive_max_pool3d(rest[None], (num_latent_frames - 1, height, width))[0]
    return torch.cat([first, rest])[None, None]


def to_pixels(mask: Tensor, num_frames: int, height: int, width: int) -> Tensor:
    """Return a latent mask [1, 1, T, h, w] as float [F, H, W], each latent frame's for the frames it stands for."""
    num_latent_frames = mask.shape[2]
    per_latent = max(1, (num_frames - 1) // max(1, num_latent_frames - 1))
    latent_of = (torch.arange(num_frames) + per_latent - 1) // per_latent
    shown = mask[0, 0, latent_of.clamp(max=num_latent_frames - 1)]
    return nn.functional.interpolate(shown[:, None], size=(height, width), mode="nearest-exact")[:, 0]


def soft(mask: Tensor, border: int) -> Tensor:
    """Return a mask [..., H, W] that is what it was inside and fades out over `border` pixels outside."""
    if border < 1:
        return mask
    flat = mask.reshape(-1, 1, *mask.shape[-2:])
    # Half of the border wider, and the mean over all of it: 1 at the edge, 0 where the border ends.
    reach = (border + 1) // 2
    wide = nn.functional.max_pool2d(flat, 2 * reach + 1, stride=1, padding=reach)
    faded = nn.functional.avg_pool2d(wide, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)
    return torch.maximum(flat, faded).reshape(mask.shape)


def renewed(noise: Tensor, fresh: Tensor, share: Tensor) -> Tensor:
    """Return noise of which a share is fresh, as strong as before; all [B, C, T, h, w], or broadcast to it.

    What a clip's noise keeps of its subject is what stands in the way of another one.
    """
    return (1 - share.square()).sqrt() * noise + share * fresh


def kept(velocity: Velocity, data: Tensor, noise: Tensor, mask: Tensor) -> Velocity:
    """Return a velocity that sees the clip outside of a mask, with `noise` as strong as everywhere else.

    data and noise [B, C, T, h, w]; mask broadcast to them, between 0 and 1 at its border. It takes the latents as it
    finds them, so that a border is blended once, not once a step.
    """

    def at_sigma(latents: Tensor, sigma: Tensor) -> Tensor:
        known = (1 - sigma) * data + sigma * noise
        return velocity(mask * latents + (1 - mask) * known, sigma)

    return at_sigma
