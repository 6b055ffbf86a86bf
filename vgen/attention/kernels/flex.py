"""Block-sparse attention by torch's FlexAttention, from lists of blocks, so that a new mask is not a new program."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vgen.attention import blocks


def attend(q: Tensor, k: Tensor, v: Tensor, mask: blocks.BlockMask, scale: float) -> Tensor:
    """Return attention [B, H, N * block, D] under a mask; the first call for a shape and a block compiles."""
    found: Tensor = _compiled()(q, k, v, block_mask=block_mask(mask), scale=scale)
    return found


def block_mask(mask: blocks.BlockMask) -> Any:
    """Return the mask as FlexAttention takes it: full blocks, and ragged ones with a mask of places."""
    from torch.nn.attention.flex_attention import BlockMask

    b = mask.layout.block
    full = mask.layout.sizes == b
    padded = mask.layout.is_padded

    kept, many_batches, many_heads = mask.kept, mask.kept.shape[0] > 1, mask.kept.shape[1] > 1

    def is_kept(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # The lists alone decide in the compiled kernel; this says the same where it is not compiled.
        return kept[batch * many_batches, head * many_heads, query // b, key // b] & ~padded[key]

    ragged_counts, ragged = _listed(mask.kept & ~full)
    full_counts, whole = _listed(mask.kept & full)
    return BlockMask.from_kv_blocks(
        ragged_counts,
        ragged,
        full_counts,
        whole,
        BLOCK_SIZE=b,
        mask_mod=is_kept,
        seq_lengths=(len(padded), len(padded)),
    )


def _listed(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks each row sees [B, H, N], and their numbers in front of the others' [B, H, N, N]."""
    numbers = kept.int().argsort(dim=-1, descending=True, stable=True).int()
    return kept.sum(-1).int(), numbers


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
