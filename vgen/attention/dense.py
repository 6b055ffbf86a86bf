"""Dense attention: every token sees every other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vgen.attention.patterns import Choice, Grid, Options, Site

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.attention.blocks import Layout


@dataclass(frozen=True, kw_only=True)
class Dense(Options):
    """All blocks, run by the model's own attention; with `kernel` set, by that one."""

    def layout(self, grid: Grid, tokens: Tensor, text: Tensor) -> Layout:
        """Return blocks of tokens as they come."""
        from vgen.attention.blocks import cut

        return cut([tokens.flatten()], text, block=self.block, num_tokens=tokens.numel() + len(text))

    def choose(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, site: Site) -> Choice:
        """Return no mask, or with a kernel one that keeps everything."""
        if self.kernel == "auto":
            return Choice()
        import torch

        from vgen.attention.blocks import with_text

        video = layout.num_blocks - layout.num_text_blocks
        return Choice(mask=with_text(torch.ones(video, video, dtype=torch.bool, device=q.device), layout))
