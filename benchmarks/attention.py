"""What sparse attention saves and changes: a table on Toyland's long clips, and how time grows with length.

    python benchmarks/attention.py                       # everything, hours on two cores
    python benchmarks/attention.py --prompts 2 --steps 4 # a trial
    python benchmarks/attention.py --only scaling

The table has one row for each method: the score of its videos by the probes, and against dense attention at the same
seeds PSNR and SSIM, what it left out, what its masks recalled, and how much faster denoising and attention alone were.
Recall is measured in the first videos only, and its time is taken off. The scaling line times attention alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from toyland import cpu_name

from vgen import attention, runtime
from vgen.attention import kernels
from vgen.attention.patterns import Site
from vgen.checkpoints import resolve
from vgen.metrics.fidelity import psnr, ssim
from vgen.pipelines import run, text_to_video, tile_search
from vgen.pipelines.bench import interleaved
from vgen.pipelines.run import Watch
from vgen.request import GenerateRequest, Plan, plan
from vgen.toyland import probes
from vgen.toyland.prompts import ATTRIBUTES, held_out, truth

METHODS = ("dense", "adaspa:sparsity=0.8", "adaspa:sparsity=0.8,block=16", "tile:global=4", "radial", "sliding-tile")
MEASURED = 2  # videos
FRAMES = 129  # 33 latent frames of 8 x 8 tokens: 2,112
GRIDS = ((16, 16, 16), (32, 16, 16), (64, 16, 16), (128, 16, 16))  # 4k to 32k tokens


def table(num_prompts: int, steps: int | None, threshold: float) -> list[dict[str, Any]]:
    """Return a row for each method."""
    checkpoint, watch = resolve("toyland"), Watch()
    prompts = held_out()

    def planned(index: int, asked: str) -> Plan:
        request = GenerateRequest(
            prompt=prompts[index].text,
            seed=index % len(prompts),
            num_frames=FRAMES,
            num_inference_steps=steps,
            attention=asked,
        )
        return plan(request, checkpoint)

    first = planned(0, "dense")
    backbone = run.load(first, watch=watch)
    reader = probes.load()
    plain: list[tuple[torch.Tensor, float, float]] = []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tile.json")
        searched = tile_search.search([planned(i, "dense") for i in (-2, -1)], threshold, file, watch=watch)
        for asked in (*METHODS, f"tile:plan={file}"):
            made: list[tuple[torch.Tensor, float, float]] = []
            readings, recalls, sparsities = [], [], []
            for index in range(num_prompts):
                wanted = planned(index, asked)
                sparse = text_to_video.sparse_attention(wanted, backbone)
                assert sparse is not None
                if index < MEASURED:
                    last = wanted.num_inference_steps - 1
                    sparse.measured_steps = frozenset({last // 2, last})
                video = text_to_video.generate(wanted, backbone, sparse=sparse)
                account = sparse.account
                made.append(
                    (torch.tensor(video.frames), video.timings["denoise"] - account.measuring, account.seconds)
                )
                readings.extend(reader.read([video.frames], wanted.fps))
                recalls += [one for found in account.recalls.values() for one in found]
                sparsities.append(account.sparsity)
            plain = plain or made
            right = [
                all(reading[name] == truth(prompts[i].clip)[name] for name in ATTRIBUTES)
                for i, reading in enumerate(readings)
            ]
            shown = asked if not asked.startswith("tile:plan") else f"tile:plan (searched, threshold {threshold})"
            pairs = list(zip(made, plain, strict=True))
            rows.append(
                {
                    "attention": shown,
                    "kernel": sparse.bound,
                    "joint": statistics.mean(right),
                    "psnr": None if asked == "dense" else statistics.mean(psnr(one[0], two[0]) for one, two in pairs),
                    "ssim": None if asked == "dense" else statistics.mean(ssim(one[0], two[0]) for one, two in pairs),
                    "sparsity": statistics.mean(sparsities),
                    "recall": statistics.mean(recalls) if recalls else None,
                    "denoise_speedup": statistics.median(two[1] for _, two in pairs)
                    / statistics.median(m[1] for m in made),
                    "attention_speedup": statistics.median(two[2] for _, two in pairs)
                    / statistics.median(m[2] for m in made),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    rows.append({"searched": searched["layers"]})
    return rows


def scaling(repeats: int, heads: int = 4, head_dim: int = 64) -> list[dict[str, Any]]:
    """Return seconds of attention alone, from 4k to 32k tokens."""
    chosen = runtime.choose()
    rows = []
    for grid in GRIDS:
        length = grid[0] * grid[1] * grid[2]
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, heads, length, head_dim, generator=generator).to(chosen.device, chosen.torch_dtype)
            for _ in range(3)
        )
        calls: dict[str, Callable[[], object]] = {
            "dense": functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v)
        }
        sparsity = {}
        for asked in ("tile:global=2", "radial"):
            pattern = attention.parse(asked)
            tokens = torch.arange(length, device=chosen.device).view(grid)
            layout = pattern.layout(grid, tokens, tokens.flatten()[:0])
            parts = [layout.split(x) for x in (q, k, v)]
            site = Site(layer=0, num_layers=1, step=0, num_steps=1, branch=0, grid=grid, scale=head_dim**-0.5,
                        num_heads=heads)  # fmt: skip
            mask = pattern.choose(*parts, layout, site).mask
            assert mask is not None
            module = kernels.load(kernels.choose("auto", chosen.device, pattern.block))
            calls[asked] = functools.partial(module.attend, *parts, mask, site.scale)
            sparsity[asked] = mask.sparsity
        seconds = interleaved(calls, repeats, chosen)
        rows.append({"tokens": length, "seconds": seconds, "sparsity": sparsity})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threshold", type=float, default=0.02)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("table", "scaling"))
    asked = parser.parse_args()
    found: dict[str, Any] = {
        "machine": f"{cpu_name()}, {os.cpu_count()} processors",
        "runtime": asdict(runtime.choose()),
        "kernel": kernels.bound(kernels.choose("auto", runtime.choose().device, 64)),
    }
    if asked.only != "scaling":
        found["table"] = table(asked.prompts, asked.steps, asked.threshold)
    if asked.only != "table":
        found["scaling"] = scaling(asked.repeats)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
