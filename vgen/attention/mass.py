"""How much of the attention lies in each block: what an adaptive method looks for, and what a mask recalls."""

from __future__ import annotations

import torch
from torch import Tensor

from vgen.attention.blocks import BlockMask, Layout

SCORES_AT_ONCE = 2**22


def block_mass(q: Tensor, k: Tensor, layout: Layout, scale: float, lse: Tensor | None = None) -> Tensor:
    """Return the sums of softmax(q k^T * scale) over each block, float32 [B, H, N, N].

    q, k [B, H, N * block, D] in the order of the layout's blocks. With `lse` [B, H, N * block], the logarithm of each
    row's sum of exponentials, one pass suffices (the second of AdaSpa's fused online search, arXiv:2502.21079);
    without it, each row is normalised by itself. Rows without a token do not count. No more than a few rows of scores
    are held at a time.
    """
    blocks, b = layout.num_blocks, layout.block
    padded = layout.is_padded
    rows = max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * len(padded) * b))
    keys = k.transpose(-1, -2)
    found = []
    for i in range(0, blocks, rows):
        part = slice(i * b, min(i + rows, blocks) * b)
        scores = (q[:, :, part] @ keys).float().mul_(scale).masked_fill_(padded, -torch.inf)
        rest = scores.logsumexp(-1, keepdim=True) if lse is None else lse[:, :, part, None]
        weights = (scores - rest).exp_().masked_fill_(padded[part, None], 0)
        found.append(weights.view(*q.shape[:2], -1, b, blocks, b).sum((3, 5)))
    return torch.cat(found, dim=2)


def recall(mask: BlockMask, mass: Tensor) -> Tensor:
    """Return the share of the attention that a mask keeps, [B, H], for the mass [B, H, N, N] of its blocks."""
    return (mass * mask.kept).sum((-1, -2)) / mass.sum((-1, -2))
