"""Compiled blocks: on CPUs their attention is a kernel of our own, and what that cannot do stays torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from vgen.attention.kernels import dense
from vgen.compiling import options_for

pytestmark = pytest.mark.skipif(dense.why_not_compiled() is not None, reason=f"{dense.why_not_compiled()}")


def tokens(heads: int, length: int, dim: int, seed: int) -> Tensor:
    """Return bfloat16 [2, heads, length, dim] as models have it: the heads of a token next to each other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, heads, dim, generator=generator).bfloat16().transpose(1, 2)


@pytest.mark.parametrize(("queries", "keys", "dim"), [(64, 64, 64), (130, 77, 128), (5, 1, 2), (70, 1031, 64)])
def test_the_kernel_is_exact_but_for_bfloat16(queries: int, keys: int, dim: int) -> None:
    q, k, v = tokens(3, queries, dim, 0) * 4, tokens(3, keys, dim, 1), tokens(3, keys, dim, 2)
    true = scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3)
    ours = torch.ops.vgen.dense_attention(q, k, v, 0.3)
    torchs = scaled_dot_product_attention(q, k, v, scale=0.3)
    assert ours.stride() == torchs.stride()
    assert (ours - true).abs().max() <= 2 * (torchs - true).abs().max() + 1e-6


def ran(function: Callable[..., Tensor], *arguments: Tensor) -> set[str]:
    """Return the names of the operators that a compiled function runs."""
    compiled = torch.compile(function, options=options_for("cpu"))
    with torch.inference_mode():
        compiled(*arguments)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            found = compiled(*arguments)
        assert (found - function(*arguments)).abs().max() < 0.02
    return {event.key for event in profiled.key_averages()}


OURS, TORCHS = "vgen::dense_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"


def test_compiled_attention_is_this_kernel() -> None:
    q, k, v = (tokens(2, 70, 64, seed) for seed in range(3))
    names = ran(lambda q, k, v: scaled_dot_product_attention(q, k, v).sin(), q, k, v)
    assert OURS in names and TORCHS not in names


def test_what_is_masked_or_in_float32_stays_with_torch() -> None:
    q, k, v = (tokens(2, 70, 64, seed) for seed in range(3))
    seen = torch.ones(70, 70, dtype=torch.bool).tril()
    assert TORCHS in ran(lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=seen), q, k, v)
    assert TORCHS in ran(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)
    assert TORCHS in ran(scaled_dot_product_attention, q.float(), k.float(), v.float())
