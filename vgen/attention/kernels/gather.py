"""Block-sparse attention by torch alone: the blocks that a query sees are gathered, and attention is dense on them."""

from __future__ import annotations

import torch
from torch import Tensor

from vgen.attention.blocks import BlockMask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Return attention [B, H, N * block, D] under a mask.

    Rows of blocks that see the same ones are asked together, where the heads share a mask: frames and tiles do. Else
    it is a row at a time, for all heads that see as many blocks.
    """
    batch, heads, _, dim = q.shape
    blocks, b = mask.layout.num_blocks, mask.layout.block
    q_blocks, k_blocks, v_blocks = (x.contiguous().view(batch * heads, blocks, b, dim) for x in (q, k, v))
    keys, values = k_blocks.view(-1, b * dim), v_blocks.view(-1, b * dim)
    out = torch.empty_like(q_blocks)
    is_full = mask.layout.sizes == b
    valid = ~mask.layout.is_padded.view(blocks, b)

    def ask(rows: Tensor, of: Tensor, seen: Tensor) -> None:
        """Fill in rows [R] of the heads [S], which see the blocks [S, n]."""
        places = (of[:, None] * blocks + seen).flatten()
        found = torch.nn.functional.scaled_dot_product_attention(
            q_blocks[of[:, None], rows].flatten(1, 2)[None],
            keys.index_select(0, places).view(1, len(of), -1, dim),
            values.index_select(0, places).view(1, len(of), -1, dim),
            attn_mask=None if bool(is_full[seen].all()) else valid[seen].flatten(1)[None, :, None],
            scale=scale,
        )
        out[of[:, None], rows] = found.view(len(of), len(rows), b, dim)

    everyone = torch.arange(batch * heads, device=q.device)
    if mask.kept.shape[:2] == (1, 1):
        for seen, rows in _alike(mask.kept[0, 0]):
            ask(rows, everyone, seen.expand(len(everyone), -1))
    else:
        kept = mask.kept.expand(batch, heads, -1, -1).flatten(0, 1)
        counts = kept.sum(-1)
        for row in range(blocks):
            for count in sorted(set(counts[:, row].tolist())):
                of = (counts[:, row] == count).nonzero()[:, 0]
                ask(torch.tensor([row], device=q.device), of, kept[of, row].nonzero()[:, 1].view(len(of), count))
    return out.view_as(q)


def _alike(kept: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (blocks that are seen, rows that see them) of a mask bool [N, N], each set of blocks once."""
    sets, which = torch.unique(kept, dim=0, return_inverse=True)
    return [(one.nonzero()[:, 0], (which == i).nonzero()[:, 0]) for i, one in enumerate(sets)]
