"""The Triton kernels, by Triton's interpreter, where Triton is installed: Linux has it among the dev extras."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch
from tests.test_attention import expanded, normal, one_group, random_mask, scaled_dot_product_attention, sparse_by
from vgen.attention import adaspa
from vgen.attention.kernels import fused
from vgen.attention.mass import block_mass

for length, dim in ((64, 16), (77, 24)):
    q, k, v = normal(2, length, dim)
    layout = one_group(length, 16)
    for heads in (2, 1):
        mask = random_mask(layout, heads, 0.4)
        expected = scaled_dot_product_attention(q, k, v, attn_mask=expanded(mask))
        assert (sparse_by("triton", layout, mask, q, k, v) - expected).abs().max() <= 1e-5
    parts = [layout.split(x) for x in (q, k, v)]
    scale = dim**-0.5
    _, lse = adaspa.dense_with_lse(*parts, layout, scale)
    found = fused.block_mass(parts[0], parts[1], layout, scale, lse)
    assert (found - block_mass(parts[0], parts[1], layout, scale)).abs().max() <= 1e-4
print("same")
"""


def test_the_fused_kernels_give_what_torch_gives() -> None:
    # In a process of its own: the interpreter is chosen when Triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parent.parent,
    )
    assert run.stdout.strip() == "same", run.stderr
