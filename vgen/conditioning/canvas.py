"""A window of video of which some pixels are given: to known latents, and back after decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vgen.conditioning.frames import KnownFrames
from vgen.errors import VgenError
from vgen.video import Frames

if TYPE_CHECKING:
    from vgen.backbones import Backbone, Shot

SOFT_BORDER = 8  # pixels: about a latent cell, as far as the VAE carries what is beside a cell into it


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Frames uint8 [F, H, W, 3] that are given where `known` bool [F, H, W] is true; the others mean nothing."""

    frames: Frames
    known: NDArray[np.bool_]

    def encode(self, backbone: Backbone, shot: Shot) -> KnownFrames:
        """Return the known latents: of a token all cells, where all of its pixels in all of its frames are given.

        Raises `VgenError` for a model whose latents do not begin with the first frame.
        """
        latents = backbone.encode_frames(torch.from_numpy(self.filled())[None])
        num_latent_frames, rows, columns = backbone.token_grid(shot.num_frames, shot.height, shot.width)
        if latents.shape[2] != num_latent_frames:
            raise VgenError(
                f'The latents of "{backbone.checkpoint.name}" are laid out in another way than frames can be given.',
                tip="use a model with a timestep per token, such as toyland.",
            )
        known_THW = known_tokens(self.known, (num_latent_frames, rows, columns))
        cells = (latents.shape[3] // rows, latents.shape[4] // columns)
        mask = np.repeat(np.repeat(known_THW, cells[0], axis=1), cells[1], axis=2)
        return KnownFrames(latents=latents, mask=torch.from_numpy(mask).to(latents.device)[None, None])

    def filled(self) -> Frames:
        """Return frames without holes for a VAE to encode, whose context reaches beyond what is known.

        A region is filled smoothly from what surrounds it. A frame of which nothing is known shows the next one that
        is, or the last: the VAE is causal, so that a still picture stands still before it, as its latents need it.
        """
        frames = torch.from_numpy(self.frames).movedim(-1, 1).float()
        known = torch.from_numpy(self.known)[:, None]
        filled = _spread(frames, known).round().to(torch.uint8).movedim(1, -1).numpy()
        some = np.flatnonzero(self.known.any((1, 2)))
        if len(some) == 0:
            return filled
        shown = some[np.minimum(np.searchsorted(some, np.arange(len(filled))), len(some) - 1)]
        return filled[shown]

    def paste(self, made: Frames) -> Frames:
        """Return `made` with the known pixels in place, exactly; inside of the border what is made leans on them.

        The difference at the border is spread into the region and fades out over `SOFT_BORDER` pixels. What the
        user's frames have inside of the region is not looked at.
        """
        frames = torch.from_numpy(made).movedim(-1, 1).float()
        known = torch.from_numpy(self.known)[:, None]
        difference = torch.from_numpy(self.frames).movedim(-1, 1).float() - frames
        width = 2 * SOFT_BORDER + 1
        nearness = nn.functional.avg_pool2d(
            known.float(), width, stride=1, padding=SOFT_BORDER, count_include_pad=False
        )
        change = difference.where(known, _spread(difference, known) * (2 * nearness).clamp(max=1))
        return (frames + change).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()


def known_tokens(known: NDArray[np.bool_], grid: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Return which tokens [T, H, W] of a `grid` have all of their pixels in `known` [F, h, w].

    The first latent frame stands for the first frame, each one after it for an equal share of the rest.
    """
    num_latent_frames, rows, columns = grid
    height, width = known.shape[1] // rows, known.shape[2] // columns
    known_FHW: NDArray[np.bool_] = np.all(known.reshape(len(known), rows, height, columns, width), (2, 4))
    first, rest = known_FHW[:1], known_FHW[1:]
    if num_latent_frames == 1:
        return first
    return np.concatenate([first, np.all(rest.reshape(num_latent_frames - 1, -1, rows, columns), 1)])


def _spread(values: Tensor, known: Tensor) -> Tensor:
    """Return `values` [N, C, H, W], and smooth ones from around where `known` [N, 1, H, W] is false; 0 without any.

    Means of the known over blocks of 2, 4, 8, ... pixels, each as fine as there is something known (push-pull).
    """
    if bool(known.all()) or values.shape[2:] == (1, 1):
        return values * known
    weight = nn.functional.avg_pool2d(known.float(), 2, ceil_mode=True)
    mean = nn.functional.avg_pool2d(values * known, 2, ceil_mode=True) / weight.clamp(min=1e-6)
    coarse = _spread(mean, weight > 0)
    return values.where(
        known, nn.functional.interpolate(coarse, size=values.shape[2:], mode="bilinear", align_corners=False)
    )
