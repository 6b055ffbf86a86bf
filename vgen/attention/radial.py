"""Radial attention (arXiv:2506.19852): the further two frames are apart, the nearer must be what sees each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vgen.attention.patterns import Choice, Grid, Options, Site
from vgen.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.attention.blocks import Layout


@dataclass(frozen=True, kw_only=True)
class Radial(Options):
    """A band around the same place of other frames, whose width halves as often as the distance in time doubles.

    Frames that are next to each other see each other whole, times `width`. Where a band would be narrower than a
    block, a block is kept at every second, fourth, ... distance instead, so that the work per frame grows as the
    logarithm of their number. The first `sink` frames are seen by all.
    """

    width: float = 1.0
    sink: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.width) and 0 < self.width <= 16):
            raise UsageError(f"A width of {self.width:g} is not legal.", tip="choose more than 0 and up to 16.")
        if self.sink < 0:
            raise UsageError(f"{self.sink} frames seen by all are not legal.", tip="choose sink=0 or more.")

    def layout(self, grid: Grid, tokens: Tensor, text: Tensor) -> Layout:
        """Return blocks that no two frames share."""
        from vgen.attention.blocks import cut

        return cut(list(tokens.flatten(1)), text, block=self.block, num_tokens=tokens.numel() + len(text))

    def choose(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, site: Site) -> Choice:
        """Return the mask of bands, the same everywhere."""
        from vgen.attention.blocks import with_text

        key = ("radial", id(layout))
        if key not in site.shared:
            site.shared[key] = with_text(self.bands(site.grid).to(q.device), layout)
        return Choice(mask=site.shared[key])

    def bands(self, grid: Grid) -> Tensor:
        """Return which video blocks see which, bool [V, V]."""
        import torch

        num_frames, per_frame = grid[0], grid[1] * grid[2]
        blocks = -(-per_frame // self.block)
        frame = torch.arange(num_frames).repeat_interleave(blocks)
        start = (torch.arange(blocks) * self.block).repeat(num_frames)
        apart = (frame[:, None] - frame).abs()
        # Tokens between the nearest ends of two blocks of a frame's sequence: 0 for the same block and its neighbours.
        gap = ((start[:, None] - start).abs() - self.block + 1).clamp(min=0)
        halvings = apart.clamp(min=1).log2().floor()
        band = per_frame * self.width / 2**halvings
        every = (self.block / band).clamp(min=1).log2().ceil().exp2().long()
        near = torch.where(band >= self.block, gap < band, (start[:, None] == start) & (apart % every == 0))
        return near | (apart == 0) | (frame < self.sink)
