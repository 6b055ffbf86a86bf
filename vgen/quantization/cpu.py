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

SOURCE = Path(__file__).with_name("integer_linear.cpp")
DTYPES = (torch.float32, torch.bfloat16)


def integer_linear(
    x: Tensor, weight: Tensor, multipliers: Tensor | None, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Return what `kernels.quantized_linear` does with inputs that are balanced; `takes` says for which x."""
    made: Tensor = torch.ops.vgen.integer_linear(x, weight, multipliers, scale, bias)
    return made


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def takes(device: str, dtype: torch.dtype) -> bool:
    """Return whether the kernel is there and takes such inputs; it is compiled when this is first asked."""
    return device == "cpu" and dtype in DTYPES and why_not_compiled() is None


@functools.cache
def why_not_compiled() -> str | None:
    """Return why the kernel cannot be compiled and loaded, which is done the first time, or None."""
    if not torch._C._has_mkldnn or not torch.cpu.get_capabilities().get("avx512_vnni", False):
        return "it needs an x86 CPU with AVX-512 VNNI"
    reason = native.why_not_loaded(SOURCE)  # without -ffast-math: it rounds as torch does
    if reason is None:
        torch.library.register_fake("vgen::integer_linear", _shaped)
    return reason


def _shaped(x: Tensor, weight: Tensor, multipliers: Tensor | None, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return an output without values, for code that is compiled."""
    return x.new_empty(*x.shape[:-1], len(weight))
