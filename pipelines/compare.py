"""One video made twice from one seed, the fast way and the plain one: what it saves, and what it changes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import files
from vgen.errors import UsageError
from vgen.pipelines import run
from vgen.pipelines.run import Watch
from vgen.plan import Plan

if TYPE_CHECKING:
    from vgen.backbones import Backbone
    from vgen.pipelines.text_to_video import Generation

SIDE_BY_SIDE, REPORT = "compare.mp4", "compare.json"
# At how many of the steps recall is measured, which costs about a dense attention each.
MEASURED_STEPS = 3


def compare(fast: Plan, plain: Plan, folder: Path, *, watch: Watch) -> dict[str, Any]:
    """Make both plans' videos and return what they say of each other; write it, and both side by side, to a folder.

    The plain video comes first, so that what is loaded or compiled once is not charged to it alone; recall is measured
    in the fast run, and the seconds of that are taken off. PSNR and SSIM are of the frames, the fast against the
    plain. Raises `VgenError`.
    """
    import numpy as np
    import torch

    from vgen import video
    from vgen.metrics.fidelity import psnr, ssim

    if (fast.width, fast.height, fast.num_frames, fast.seed) != (
        plain.width,
        plain.height,
        plain.num_frames,
        plain.seed,
    ):
        raise UsageError("The two videos are not of one size, length and seed.", tip="give both the same.")
    backbone = run.load(fast, watch=watch)
    plain_made, plain_run = _made(plain, backbone, watch, measured=False)
    fast_made, fast_run = _made(fast, backbone, watch, measured=True)
    first, second = torch.tensor(fast_made.frames), torch.tensor(plain_made.frames)
    report = {
        "model": fast.model,
        "prompt": fast.prompt,
        "seed": fast.seed,
        "device": backbone.runtime.device,
        "dtype": backbone.runtime.dtype,
        "tokens": list(backbone.token_grid(fast.num_frames, fast.height, fast.width)),
        "fast": fast_run,
        "plain": plain_run,
        "speedup": {
            name: round(plain_run[f"{name}_s"] / fast_run[f"{name}_s"], 3) for name in ("denoise", "attention")
        },
        "psnr": round(psnr(first, second), 2),
        "ssim": round(ssim(first, second), 4),
        "video": str(folder / SIDE_BY_SIDE),
    }
    watch.on_stage("write")
    video.save(np.concatenate([fast_made.frames, plain_made.frames], 2), folder / SIDE_BY_SIDE, fps=fast.fps)
    files.write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _made(plan: Plan, backbone: Backbone, watch: Watch, *, measured: bool) -> tuple[Generation, dict[str, Any]]:
    """Return a plan's video, and what its attention took and did."""
    from vgen.attention.sparse import SparseAttention
    from vgen.pipelines import text_to_video

    sparse = text_to_video.sparse_attention(plan, backbone)
    assert isinstance(sparse, SparseAttention), "both plans name an attention"
    num_steps = plan.num_inference_steps
    if measured:
        # The later ones: adaptive methods are dense at first.
        sparse.measured_steps = frozenset(num_steps - 1 - i * num_steps // 4 for i in range(MEASURED_STEPS))
    made = text_to_video.generate(
        plan, backbone, on_stage=watch.on_stage, on_step=watch.on_step, on_warning=watch.on_warning, sparse=sparse
    )
    account, did = sparse.account, sparse.to_dict()
    recalls = {layer: sum(found) / len(found) for layer, found in account.recalls.items()}
    layers = [
        {"layer": layer, "sparsity": sparsity, "recall": round(recalls[layer], 4) if layer in recalls else None}
        for layer, sparsity in enumerate(did.pop("layers"))
    ]
    return made, {
        "attention": plan.attention,
        "cache": plan.cache,
        "skipped": None if made.skipped is None else asdict(made.skipped),
        **did,
        "denoise_s": round(made.timings["denoise"] - account.measuring, 3),
        "attention_s": round(account.seconds, 3),
        "recall": round(sum(recalls.values()) / len(recalls), 4) if recalls else None,
        "layers": layers,
    }
