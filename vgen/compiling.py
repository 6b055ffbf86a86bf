"""Regional compilation: the blocks of a transformer, which are alike, are compiled once for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vgen.backbones import Backbone

# On CPUs GELU's hyperbolic tangent by a logistic function, which takes less time than the one that inductor calls.
OPTIONS: dict[str, Any] = {"cpp.use_decompose_tanh": True}


def compile_blocks(backbone: Backbone) -> None:
    """Compile what each of the transformer's blocks computes, when it is first called with inputs of a kind.

    As diffusers' `compile_repeated_blocks`, but of every family's blocks (it knows none of CogVideoX's), and below the
    hooks of offloading and caches: these stay Python, and what they call is the same code for all blocks.
    """
    import torch

    options = options_for(backbone.runtime.device)
    for block in backbone.blocks():
        # Where bits differ from block to block, each may be a kind of its own, and past its limit dynamo gives up.
        torch._dynamo.config.recompile_limit += 1
        block.forward = torch.compile(block.forward, options=options)


def options_for(device: str) -> dict[str, Any]:
    """Return inductor's options for inference on a device."""
    from vgen.attention.kernels import dense

    if device != "cpu" or dense.why_not_compiled() is not None:
        return OPTIONS
    return {**OPTIONS, "post_grad_custom_pre_pass": dense.InPlaceOfTorchs()}
