"""The Triton kernels, by Triton's interpreter and its compiler, where Triton is installed, as with the dev extras.

No GPU is needed: the interpreter tells whether the numbers are right, and the compiler whether GPUs can run them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_attention import one_group
from vgen.errors import VgenError

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from vgen.attention.kernels import fused  # noqa: E402

# Bytes of shared memory for a thread block by compute capability: CUDA C++ Programming Guide, "Compute Capabilities".
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # A100; H100 and H200
ARGUMENTS = {
    **dict.fromkeys(("lse", "mass"), "*fp32"),
    **dict.fromkeys(("starts", "keys", "sizes"), "*i32"),
    **dict.fromkeys(("length", "blocks"), "i32"),
    "scale": "fp32",
}  # the others are of the tensors' own dtype

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


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("kernel", [fused._attend, fused._mass], ids=["attend", "mass"])
def test_the_fused_kernels_are_compiled_for_gpus_and_fit_into_their_shared_memory(
    kernel: Any, capability: int
) -> None:
    for block in (64, 128):
        for dim in (64, 128):
            compiled = compiled_for(kernel, capability, block, dim, torch.bfloat16)
            assert compiled.asm["cubin"]
            assert compiled.metadata.shared <= SHARED_MEMORY[capability], (block, dim)
            assert ("wgmma" if capability == 90 else "mma.sync") in compiled.asm["ptx"]  # products on tensor cores


def test_in_float32_too_the_largest_blocks_fit_on_an_h200() -> None:
    assert compiled_for(fused._attend, 90, 128, 128, torch.float32).metadata.shared <= SHARED_MEMORY[90]


def test_a_gpu_whose_shared_memory_is_too_small_is_told_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            def launch(*args: Any, **constants: Any) -> None:
                raise OutOfResources(163_860, 101_376, "shared memory")

            return launch

    monkeypatch.setattr(fused, "_mass", Small())
    with pytest.raises(
        VgenError, match="needs 163860 bytes of shared memory for blocks of 64 and heads of 32 in bfloat16"
    ) as error:
        layout = one_group(64, 64)
        x = torch.zeros(1, 1, 64, 32, dtype=torch.bfloat16)
        fused.block_mass(x, x, layout, 1.0, torch.zeros(1, 1, 64))
    assert "block=64" in str(error.value.tip)


def compiled_for(kernel: Any, capability: int, block: int, dim: int, dtype: torch.dtype) -> Any:
    """Return a kernel as it is compiled for a GPU, as Triton would when it is launched there."""
    constants: dict[str, Any] = fused.tile(block, dim, dtype)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    if "SHARED" in kernel.arg_names:
        constants["SHARED"] = False
    own = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    signature = {name: "constexpr" if name in constants else ARGUMENTS.get(name, own) for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind.startswith("*") or kernel.arg_names[place] == "length"
    }
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(name),): constants[name] for name in constants}, aligned
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
