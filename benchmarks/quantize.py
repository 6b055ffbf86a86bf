"""Measures what each scheme loses on Toyland; prints one JSON object.

    python benchmarks/quantize.py --prompts 256 > benchmarks/results/quantize.json

Every row: the score of the videos of the first held-out prompts, the PSNR and SSIM of these against the original's at
the same seeds, the bytes of the quantized layers as a share of bfloat16, and the seconds of denoising. The first is
the original. `w4a8` is there plainly rounded, with searched scales, and balanced, so that one sees what each is worth.
Videos are kept in the folder that --folder names, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from toyland import cpu_name

from vgen import backbones, checkpoints, runtime
from vgen.metrics.fidelity import psnr, ssim
from vgen.pipelines import quantize as pipeline
from vgen.pipelines import text_to_video
from vgen.pipelines.evaluate.scores import read_all, score
from vgen.pipelines.quantize import QuantizeRequest
from vgen.pipelines.run import Watch
from vgen.quantization import export
from vgen.quantization.calibration import Statistics
from vgen.toyland.prompts import truth

ROWS = {
    "bfloat16": None,
    "w8a8": "w8a8",
    "w4a8, rounded to the nearest, a scale per channel": "w4a8:group=0,balance=false,clip=false",
    "w4a8, groups of 64": "w4a8:balance=false,clip=false",
    "w4a8, groups of 64, searched scales": "w4a8:balance=false",
    "w4a8, balanced": "w4a8",
    "w4a8-mp, 5 bits": "w4a8-mp:bits=5",
    "w4a16": "w4a16",
}


def measured(
    name: str, scheme: str | None, folder: Path, num_prompts: int, calibrated: list[Statistics]
) -> dict[str, Any]:
    """Return the row of a scheme, its videos made where they are not in the folder yet.

    What the original's layers see is the same for all schemes, and kept in `calibrated`.
    """
    checkpoint = checkpoints.resolve("toyland")
    asked = QuantizeRequest(model="toyland", scheme=scheme or "w8a8", output=folder / "export", compare=num_prompts)
    plan = pipeline.plan(asked, checkpoint)
    backbone = backbones.load(checkpoint, runtime.choose())
    row: dict[str, Any] = {"scheme": scheme, "layers_share": 1.0, "bits_per_weight": 16.0}
    if scheme is not None:
        if plan.scheme.is_calibrated and not calibrated:
            calibrated.append(pipeline.calibrate(backbone, plan, Watch()))
        formats, _ = pipeline.quantize_layers(backbone, plan, (calibrated or [Statistics()])[0], Watch())
        share = export.sizes(checkpoint, plan.layers, formats).share
        row |= {"layers_share": round(share, 4), "bits_per_weight": round(16 * share, 3)}
    places = folder / name.replace(" ", "-").replace(",", "")
    places.mkdir(parents=True, exist_ok=True)
    for index, video in enumerate(plan.comparison):
        place = places / f"{index:03d}.npz"
        if not place.exists():
            made = text_to_video.generate(video, backbone)
            part = place.with_suffix(".part.npz")
            np.savez_compressed(part, frames=made.frames, seconds=made.timings["denoise"])
            part.rename(place)
    loaded = [np.load(places / f"{index:03d}.npz") for index in range(num_prompts)]
    frames = [one["frames"] for one in loaded]
    truths = [truth(prompt.clip) for prompt in plan.prompts]
    original = [np.load(folder / "bfloat16" / f"{index:03d}.npz")["frames"] for index in range(num_prompts)]
    pairs = [(torch.from_numpy(one), torch.from_numpy(other)) for one, other in zip(original, frames, strict=True)]
    return row | {
        "score": score(read_all(frames, plan.comparison[0].fps), truths),
        "psnr": round(sum(psnr(*pair) for pair in pairs) / num_prompts, 2),
        "ssim": round(sum(ssim(*pair) for pair in pairs) / num_prompts, 4),
        "denoise_seconds": round(float(np.median([one["seconds"] for one in loaded])), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("runs/quantize"))
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    calibrated: list[Statistics] = []
    for name, scheme in ROWS.items():
        start = time.perf_counter()
        rows[name] = measured(name, scheme, arguments.folder, arguments.prompts, calibrated)
        print(f"{name}: {rows[name]} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    machine = (
        f"{cpu_name()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(json.dumps({"machine": machine, "prompts": arguments.prompts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
