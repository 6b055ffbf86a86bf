"""The layer-wise search of Efficient-vDiT (arXiv:2502.06155, algorithm 1): how few frames each layer needs to see."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import attention, files
from vgen.attention.patterns import Pattern, Site
from vgen.errors import UsageError
from vgen.pipelines import run
from vgen.pipelines.run import Watch
from vgen.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.attention.blocks import Layout

# At which shares of a run layers are looked at.
SHARES = (0.2, 0.5, 0.8)


def search(plans: Sequence[Plan], threshold: float, output: Path, *, block: int = 64, watch: Watch) -> dict[str, Any]:
    """Write a plan for `tile:plan=FILE`: for each layer the fewest global frames whose error is under a threshold.

    The error of a layer is the squared difference of its attention's output from the dense one, divided by the square
    of the dense one, so that a threshold means the same in every layer and model; it is the mean over the plans'
    videos, a few steps and the branches of guidance. A layer that needs more than half of the frames stays dense.
    Raises `UsageError`.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"A threshold of {threshold:g} is not legal.", tip="choose more than 0 and up to 1, as 0.05.")
    attention.parse(f"tile:block={block}")  # for its checks
    import torch

    from vgen.attention import kernels
    from vgen.attention.blocks import with_text
    from vgen.attention.tile import frame_tiles
    from vgen.pipelines import text_to_video

    first = plans[0]
    backbone = run.load(first, watch=watch)
    grid = backbone.token_grid(first.num_frames, first.height, first.width)
    num_frames, num_layers = grid[0], len(backbone.attention_slots())
    candidates = list(range(1, num_frames // 2 + 1))
    if not candidates:
        raise UsageError(f"A video of {num_frames} latent frames has none to leave out.", tip="give more --frames.")
    tiles = attention.parse(f"tile:global={num_frames},block={block}")
    kernel = kernels.load(kernels.choose("auto", backbone.runtime.device, block))
    steps = {int(share * first.num_inference_steps) for share in SHARES}
    errors: list[list[list[float]]] = [[[] for _ in candidates] for _ in range(num_layers)]

    def look(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lay_out: Callable[[Pattern], Layout], site: Site) -> None:
        if site.step not in steps:
            return
        layout = lay_out(tiles)
        parts = [layout.split(x) for x in (q, k, v)]
        per_frame = (layout.num_blocks - layout.num_text_blocks) // num_frames
        power = out.float().square().sum()
        for i, num_global in enumerate(candidates):
            seen = frame_tiles(num_frames, num_global, device=q.device)
            mask = with_text(seen.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1), layout)
            masked = layout.join(kernel.attend(*parts, mask, site.scale))
            errors[site.layer][i].append(((masked.float() - out.float()).square().sum() / power).item())

    for plan in plans:
        sparse = text_to_video.sparse_attention(
            replace(plan, attention=f"tile:global={num_frames},block={block}"), backbone
        )
        assert sparse is not None
        sparse.look = look
        text_to_video.generate(
            plan, backbone, on_stage=watch.on_stage, on_step=watch.on_step, on_warning=watch.on_warning, sparse=sparse
        )
    means = torch.tensor(errors).mean(-1).tolist()
    layers: list[dict[str, Any]] = []
    for layer, by_frames in enumerate(means):
        under = [i for i, error in enumerate(by_frames) if error < threshold]
        chosen = under[0] if under else None
        layers.append(
            {
                "layer": layer,
                "global": None if chosen is None else candidates[chosen],
                "error": None if chosen is None else round(by_frames[chosen], 6),
                "errors": {str(count): round(error, 6) for count, error in zip(candidates, by_frames, strict=True)},
            }
        )
    left_out = [
        0.0 if count is None else (num_frames - count) * (num_frames - count - 1) / num_frames**2
        for count in (layer["global"] for layer in layers)
    ]
    plan_of_layers = {
        "method": "tile",
        "model": first.model,
        "grid": list(grid),
        "threshold": threshold,
        "prompts": [plan.prompt for plan in plans],
        "sparsity": round(sum(left_out) / len(left_out), 4),
        "layers": layers,
    }
    files.write_text(output, json.dumps(plan_of_layers, indent=2) + "\n")
    return plan_of_layers
