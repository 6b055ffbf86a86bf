"""Quantized linear layers on a CPU, by a kernel that is compiled once for each machine (`integer_linear.cpp`).

It rounds, unpacks, multiplies and scales in the cache, which torch's operators, one after the other, do not; they take
its place where it cannot be compiled, and give the same numbers.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from vgen import native
from vgen.quantization.balance import balance_inputs

SOURCE = Path(__file__).with_name("integer_linear.cpp")
DTYPES = (torch.float32, torch.bfloat16)
BALANCED_AT_ONCE = 2**19  # values, which caches hold


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    multipliers: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    balancing: Tensor | None,
) -> Tensor:
    """Return what `kernels.quantized_linear` does; `takes` says for which x."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    count, width = rows.shape
    tokens = torch.empty(count, (width + 3) // 4 * 4, dtype=torch.uint8)
    token_scales = torch.empty(count)
    at_once = count if balancing is None else max(128, BALANCED_AT_ONCE // width)
    for start in range(0, count, at_once):
        part = slice(start, start + at_once)
        balanced = rows[part] if balancing is None else balance_inputs(rows[part], balancing)
        torch.ops.vgen.quantize_tokens(balanced, tokens[part], token_scales[part])
    offset = torch.zeros_like(scale) if bias is None else bias.float()
    out = x.new_empty(count, len(weight))
    torch.ops.vgen.integer_linear(tokens, token_scales, weight, multipliers, scale, offset, out)
    return out.view(*x.shape[:-1], len(weight))


@torch.library.custom_op("vgen::quantized_linear", mutates_args=())
def _quantized_linear(
    x: Tensor,
    weight: Tensor,
    multipliers: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    balancing: Tensor | None,
) -> Tensor:
    """Stand for the layer in compiled code, which calls it as it is."""
    return quantized_linear(x, weight, multipliers, scale, bias, balancing)


@_quantized_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    multipliers: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    balancing: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def takes(device: str, dtype: torch.dtype) -> bool:
    """Return whether the kernel is there and takes such inputs; it is compiled when this is first asked."""
    return device == "cpu" and dtype in DTYPES and why_not_compiled() is None


@functools.cache
def why_not_compiled() -> str | None:
    """Return why the kernel cannot be compiled and loaded, which is done the first time, or None."""
    if not torch._C._has_mkldnn or not torch.cpu.get_capabilities().get("avx512_vnni", False):
        return "it needs an x86 CPU with AVX-512 VNNI"
    return native.why_not_loaded(SOURCE)  # without -ffast-math: it rounds as torch does
