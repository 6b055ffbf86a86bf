"""The oracle of every other kernel: torch's attention, with the mask written out for every pair of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vgen.attention.blocks import BlockMask

PAIRS_AT_ONCE = 2**26


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Return attention [B, H, N * block, D] under a mask, some rows of blocks at a time."""
    b = mask.layout.block
    rows = max(1, PAIRS_AT_ONCE // (mask.kept.shape[0] * mask.kept.shape[1] * b * k.shape[2]))
    found = []
    for i in range(0, mask.layout.num_blocks, rows):
        kept = mask.kept[:, :, i : i + rows].repeat_interleave(b, -1).repeat_interleave(b, -2)
        part = q[:, :, i * b : (i + rows) * b]
        kept = kept & ~mask.layout.is_padded
        found.append(torch.nn.functional.scaled_dot_product_attention(part, k, v, attn_mask=kept, scale=scale))
    return torch.cat(found, dim=2)
