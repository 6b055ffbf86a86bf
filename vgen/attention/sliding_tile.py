"""Sliding tiles (arXiv:2502.04507): a video is cut into boxes, and each box sees those in a window around it."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vgen.attention.patterns import Choice, Grid, Options, Site
from vgen.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.attention.blocks import Layout


@dataclass(frozen=True, kw_only=True)
class SlidingTile(Options):
    """Boxes of `tile` tokens (frames x rows x columns), one to a block, and a `window` of boxes that each sees.

    At a border the window is moved inside, so that every box sees as many. Boxes at ragged borders are smaller.
    """

    tile: str = "4x4x4"
    window: str = "3x3x3"

    def __post_init__(self) -> None:
        super().__post_init__()
        size = math.prod(_sizes("tile", self.tile))
        if size > self.block:
            raise UsageError(
                f"A tile of {self.tile} has {size} tokens, more than a block of {self.block}.",
                tip="choose smaller tiles, or block=128.",
            )
        if any(side % 2 == 0 for side in _sizes("window", self.window)):
            raise UsageError(
                f"A window of {self.window} tiles has no middle.", tip="choose odd numbers, as in window=3x3x3."
            )

    def layout(self, grid: Grid, tokens: Tensor, text: Tensor) -> Layout:
        """Return a block for each box, box after box."""
        from vgen.attention.blocks import cut

        sides = _sizes("tile", self.tile)
        boxes = itertools.product(*(range(0, size, side) for size, side in zip(grid, sides, strict=True)))
        t, h, w = sides
        groups = [tokens[i : i + t, j : j + h, k : k + w].flatten() for i, j, k in boxes]
        return cut(groups, text, block=self.block, num_tokens=tokens.numel() + len(text))

    def choose(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, site: Site) -> Choice:
        """Return the mask of windows, the same everywhere."""
        import torch

        from vgen.attention.blocks import with_text

        key = ("sliding-tile", id(layout))
        if key not in site.shared:
            sides = zip(site.grid, _sizes("tile", self.tile), _sizes("window", self.window), strict=True)
            t, h, w = (_windows(-(-size // side), window, q.device) for size, side, window in sides)
            video = torch.einsum("ab,cd,ef->acebdf", t, h, w) > 0
            site.shared[key] = with_text(video.flatten(3).flatten(0, 2), layout)
        return Choice(mask=site.shared[key])


def _windows(count: int, window: int, device: object) -> Tensor:
    """Return which of `count` boxes in a line see which, 1 or 0, float [count, count]."""
    import torch

    places = torch.arange(count, device=device)  # type: ignore[call-overload]
    first = (places - window // 2).clamp(max=count - window).clamp(min=0)[:, None]
    seen: Tensor = (places >= first) & (places < first + window)
    return seen.float()


def _sizes(name: str, text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise UsageError(
            f'Cannot read {name}="{text}": frames x rows x columns are expected.', tip=f"write {name}=4x4x4."
        )
    t, h, w = (int(side) for side in text.split("x"))
    return t, h, w
