"""Block-sparse attention on a CPU, by a small kernel that is compiled once for each machine (`attention.cpp`).

It runs at the speed that the mask promises, which gathering does not, and keeps its sums in float32, which torch's
batched products do not in bfloat16. Where it cannot be compiled, `gather` takes its place, and `bound` says so.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from vgen import native
from vgen.attention import mass
from vgen.attention.blocks import BlockMask, Layout
from vgen.attention.kernels import gather

SOURCE = Path(__file__).with_name("attention.cpp")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Return attention [B, H, N * block, D] under a mask; float32 and bfloat16 are compiled, others gathered."""
    if not _takes(q):
        return gather.attend(q, k, v, mask, scale)
    batch, heads, _, dim = q.shape
    blocks, b = mask.layout.num_blocks, mask.layout.block
    q_blocks, k_blocks, v_blocks = (x.contiguous().view(batch * heads, blocks, b, dim) for x in (q, k, v))
    k_blocks = _transposed(k_blocks)
    if q.dtype != torch.float32:
        v_blocks = v_blocks.view(-1, blocks, b // 2, 2, dim).transpose(3, 4).contiguous()
    starts, keys = _rows(mask, batch, heads)
    out = torch.empty_like(q_blocks)
    torch.ops.vgen.block_sparse(q_blocks, k_blocks, v_blocks, starts, keys, mask.layout.sizes.int(), out, scale)
    return out.view_as(q)


def block_mass(q: Tensor, k: Tensor, layout: Layout, scale: float, lse: Tensor) -> Tensor:
    """Return what `mass.block_mass` does for a known `lse`, float32 [B, H, N, N], a tile of scores at a time.

    The scores of a whole row of blocks, which torch would write to memory and read again, are in no cache at length.
    """
    if not _takes(q):
        return mass.block_mass(q, k, layout, scale, lse)
    batch, heads, _, dim = q.shape
    blocks, b = layout.num_blocks, layout.block
    q_blocks, k_blocks = (x.contiguous().view(batch * heads, blocks, b, dim) for x in (q, k))
    out = torch.empty(batch, heads, blocks, blocks)
    sizes = layout.sizes.int()
    torch.ops.vgen.block_mass(q_blocks, _transposed(k_blocks), lse.float().contiguous(), sizes, out, scale)
    return out


def bound() -> str:
    """Return what attention is run by."""
    reason = why_not_compiled()
    return "cpu (compiled)" if reason is None else f"gather (cpu cannot be compiled: {reason})"


def why_not_compiled() -> str | None:
    """Return why the kernel cannot be compiled and loaded, which is done the first time, or None."""
    if not _dtypes():
        return "it needs an x86 CPU with AVX2"
    return native.why_not_loaded(SOURCE, "-ffast-math")


@functools.cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """Return the number formats that oneDNN's small matrix kernel multiplies on this CPU."""
    can = torch.cpu.get_capabilities()
    if not torch._C._has_mkldnn or not can.get("avx2", False):
        return ()
    return (torch.float32, torch.bfloat16) if can.get("avx512_bf16", False) else (torch.float32,)


def multiplies(dtype: torch.dtype) -> bool:
    """Return whether this CPU has instructions for matrices of a number format."""
    return dtype in _dtypes()


def _takes(q: Tensor) -> bool:
    """Return whether the compiled kernel is there and multiplies such queries."""
    return q.dtype in _dtypes() and q.shape[-1] % 2 == 0 and why_not_compiled() is None


def _transposed(blocks: Tensor) -> Tensor:
    """Return blocks of keys [heads, N, b, D] as the kernel takes them: [heads, N, D, b], bfloat16 in pairs of rows."""
    if blocks.dtype == torch.float32:
        return blocks.mT.contiguous()
    heads, count, b, dim = blocks.shape
    return blocks.view(heads, count, b, dim // 2, 2).transpose(2, 3).contiguous()


def _rows(mask: BlockMask, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """Return (starts, keys) of `BlockMask.rows` for all heads, also where they share a mask."""
    if mask.kept.shape[:2] == (batch, heads):
        return mask.rows
    return BlockMask(kept=mask.kept.expand(batch, heads, -1, -1), layout=mask.layout).rows
