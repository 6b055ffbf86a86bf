"""Dense attention on a CPU by `attention.cpp`, for compiled blocks: it takes half of the time of torch's, or less.

Whoever compiles waits anyway, and has a C++ compiler. Outside of compiled blocks attention stays torch's; inside, too,
what is not in bfloat16, is masked or will have a backward pass.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from vgen.attention.kernels import cpu

TORCHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@functools.cache
def why_not_compiled() -> str | None:
    """Return why the kernel cannot be compiled and loaded, which is done the first time, or None."""
    if not cpu.multiplies(torch.bfloat16):
        return "it needs an x86 CPU with AVX-512 BF16"
    reason = cpu.why_not_compiled()
    if reason is None:
        torch.library.register_fake("vgen::dense_attention", _like_torchs)
    return reason


def _like_torchs(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return what the kernel gives in shape and strides: [B, H, L, D], in memory [B, L, H, D]."""
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads, dim).transpose(1, 2)


class InPlaceOfTorchs(CustomGraphPass):
    """Inductor's pass over a graph that lets this kernel do what torch's would."""

    def __call__(self, graph: Graph) -> None:
        """Replace the calls that the kernel can do."""
        for node in graph.find_nodes(op="call_function", target=TORCHS):
            if not _takes(node):
                continue
            query = node.args[0].meta["val"]
            scale = node.kwargs.get("scale")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            with graph.inserting_before(node):
                ours = graph.call_function(torch.ops.vgen.dense_attention.default, (*node.args[:3], scale))
            for output in list(node.users):
                ours.meta.update(output.meta)
                output.replace_all_uses_with(ours)
                graph.erase_node(output)
            graph.erase_node(node)

    def uuid(self) -> Any:
        """Return what tells this pass from others, in inductor's cache."""
        return get_hash_for_files((__file__, str(cpu.SOURCE)))


def _takes(node: Node) -> bool:
    """Return whether the kernel can do a call of torch's: plain, in bfloat16, of which only the output is used."""
    # Dropout, causality and a mask, wherever they are given.
    plain = not any(node.args[3:]) and not any(value for name, value in node.kwargs.items() if name != "scale")
    query, key, value = (argument.meta["val"] for argument in node.args[:3])  # type: ignore[union-attr]
    rows = all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in (query, key, value))
    alone = all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
    return plain and rows and alone and query.shape[-1] % 2 == 0
