"""Block-sparse attention and AdaSpa's search as Triton kernels, for CUDA GPUs.

Both go over the key blocks of one block of queries. `TRITON_INTERPRET=1` runs them on a CPU, for tests, which also
compile them for GPUs that are not there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from vgen.attention.blocks import BlockMask, Layout
from vgen.errors import VgenError

LOG2_E = 1.4426950408889634


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Return attention [B, H, N * block, D] under a mask: the flash recurrence over the blocks that are kept."""
    batch, heads, length, dim = q.shape
    blocks, b = mask.layout.num_blocks, mask.layout.block
    q, k, v = (x.contiguous() for x in (q, k, v))
    kept = mask.kept if mask.kept.shape[0] == 1 else mask.kept.expand(batch, -1, -1, -1)
    shared = kept.shape[0] == 1 and kept.shape[1] == 1
    if not shared:
        kept = kept.expand(batch, heads, -1, -1)
    starts, keys = mask.rows if kept is mask.kept else BlockMask(kept=kept, layout=mask.layout).rows
    out = torch.empty_like(q)
    _launch(
        _attend,
        (blocks, batch * heads),
        q,
        k,
        v,
        out,
        starts,
        keys,
        mask.layout.sizes.int(),
        scale * LOG2_E,
        length,
        blocks,
        SHARED=shared,
        **tile(b, dim, q.dtype),
    )
    return out


def block_mass(q: Tensor, k: Tensor, layout: Layout, scale: float, lse: Tensor) -> Tensor:
    """Return the sums of softmax(q k^T * scale) over blocks, float32 [B, H, N, N], for `lse` [B, H, N * block].

    The second pass of the fused online search (arXiv:2502.21079): the scores are made again, tile by tile, and nothing
    of length x length is ever in memory.
    """
    batch, heads, length, dim = q.shape
    blocks, b = layout.num_blocks, layout.block
    mass = torch.empty(batch, heads, blocks, blocks, dtype=torch.float32, device=q.device)
    _launch(
        _mass,
        (blocks, batch * heads),
        q.contiguous(),
        k.contiguous(),
        lse.float().contiguous(),
        mass,
        layout.sizes.int(),
        scale * LOG2_E,
        length,
        blocks,
        **tile(b, dim, q.dtype),
    )
    return mass


def tile(block: int, dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Return a tile's constants and how it is launched: in float32 shared memory has no room for the tile to come."""
    return {
        "B": block,
        "D": dim,
        "WIDTH": max(16, triton.next_power_of_2(dim)),
        "num_warps": 4 if block <= 64 else 8,
        "num_stages": 3 if dtype.itemsize == 2 else 1,
    }


def _launch(kernel: Any, grid: tuple[int, int], q: Tensor, *args: Any, **constants: int | bool) -> None:
    try:
        kernel[grid](q, *args, **constants)
    except OutOfResources as error:
        dtype = str(q.dtype).removeprefix("torch.")
        raise VgenError(
            f'The attention kernel "triton" needs {error.required} bytes of {error.name} for blocks of '
            f"{constants['B']} and heads of {constants['D']} in {dtype}, and this GPU has {error.limit}.",
            tip="take smaller blocks (block=64), 16 bits (--dtype bfloat16) or another kernel (kernel=flex).",
        ) from None


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, out, starts, keys, sizes, scale, length, blocks,
    SHARED: tl.constexpr, B: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    line = row if SHARED else head * blocks + row
    places = tl.arange(0, B)
    columns = tl.arange(0, WIDTH)
    inside = columns[None, :] < D
    at = head * length * D + (row * B + places)[:, None] * D + columns[None, :]
    queries = tl.load(q + at, mask=inside, other=0.0)
    top = tl.full([B], -1e30, tl.float32)
    total = tl.zeros([B], tl.float32)
    mean = tl.zeros([B, WIDTH], tl.float32)
    for i in range(tl.load(starts + line), tl.load(starts + line + 1)):
        block = tl.load(keys + i)
        key_at = head * length * D + (block * B + places)[:, None] * D + columns[None, :]
        scores = tl.dot(queries, tl.trans(tl.load(k + key_at, mask=inside, other=0.0)), input_precision="ieee")
        scores = tl.where(places[None, :] < tl.load(sizes + block), scores, -1e30)
        highest = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - highest[:, None])  # one fused multiply-add for each score
        factor = tl.exp2(top - highest)
        total = total * factor + tl.sum(weights, 1)
        values = tl.load(v + key_at, mask=inside, other=0.0)
        mean = mean * factor[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = highest
    tl.store(out + at, (mean / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _mass(  # type: ignore[no-untyped-def]
    q, k, lse, mass, sizes, scale, length, blocks, B: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    places = tl.arange(0, B)
    columns = tl.arange(0, WIDTH)
    inside = columns[None, :] < D
    at = head * length * D + (row * B + places)[:, None] * D + columns[None, :]
    queries = tl.load(q + at, mask=inside, other=0.0)
    rest = tl.load(lse + head * length + row * B + places) * 1.4426950408889634
    is_query = places < tl.load(sizes + row)
    for block in range(blocks):
        key_at = head * length * D + (block * B + places)[:, None] * D + columns[None, :]
        scores = tl.dot(queries, tl.trans(tl.load(k + key_at, mask=inside, other=0.0)), input_precision="ieee") * scale
        counts = is_query[:, None] & (places[None, :] < tl.load(sizes + block))
        weights = tl.where(counts, tl.exp2(scores - rest[:, None]), 0.0)
        tl.store(mass + (head * blocks + row) * blocks + block, tl.sum(tl.sum(weights, 1), 0))
