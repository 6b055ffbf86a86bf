"""What sparse attention saves and changes; prints one JSON object.

    python benchmarks/attention.py > benchmarks/results/attention.json
    python benchmarks/attention.py --prompts 1 --steps 4 --only videos      # a trial

Five parts, in this order; --only NAME chooses some of them:

* videos: Toyland's long clips (--shape, 2,000 tokens or more), a row for each method: their score by the probes, and
  against dense attention at the same seeds PSNR and SSIM, what was left out, what the masks recalled, and how much
  faster denoising and attention alone were, warm-up and searches included. Recall is measured at one step, the time
  of which is taken off.
* images: the same with the first frame of each prompt's true clip as `--image`.
* kernels: `vgen bench attention` at 8k and 16k tokens.
* scaling: attention alone from 4k to 32k tokens.
* blocks: `vgen bench attention --random-weights`, a block of a published model at 480p and 81 frames.

What is finished lies in the folder that --folder names, one file for each video and measurement, so that a run that
was stopped goes on, and more prompts are added to those that are there. Remove it when weights or kernels change.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from toyland import cpu_name

from vgen import attention, files, runtime, video
from vgen.attention import kernels
from vgen.attention.patterns import Site
from vgen.checkpoints import resolve
from vgen.metrics.fidelity import psnr, ssim
from vgen.pipelines import run, text_to_video, tile_search
from vgen.pipelines.bench import in_turns
from vgen.pipelines.bench.attention import Shape, bench_attention, bench_block
from vgen.pipelines.evaluate.scores import all_right, gained, read_all, score
from vgen.pipelines.run import Watch
from vgen.plan import Plan, plan
from vgen.request import GenerateRequest
from vgen.toyland.prompts import held_out, truth
from vgen.toyland.renderer import render

SEARCHED = "tile:plan"
PARTS = ("videos", "images", "kernels", "scaling", "blocks")
METHODS = (
    "dense",
    "adaspa:sparsity=0.8",
    "adaspa:sparsity=0.8,warmup=0.4",
    SEARCHED,
    "radial",
    "sliding-tile",
)
SHAPE = "33x240x240"  # 9 latent frames of 15 x 15 tokens: 2,025
GRIDS = ((16, 16, 16), (32, 16, 16), (64, 16, 16), (128, 16, 16))  # 4k to 32k tokens
MODELS = ("wan2.1-1.3b", "hunyuanvideo")
HEADS = 4  # of kernels and scaling: the time of each head is the same


def kept(path: Path, measure: Callable[[], Any]) -> Any:
    """Return what a file has, or what is measured now and written to it."""
    if not path.exists():
        start = time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(measure()) + "\n")
        print(f"{path.stem}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return json.loads(path.read_text())


def videos(
    folder: Path,
    shape: str,
    num_prompts: int,
    steps: int | None,
    threshold: float,
    methods: Sequence[str],
    *,
    from_images: bool = False,
) -> dict[str, Any]:
    """Return a row for each method and the plan that was searched; `shape` is frames x height x width."""
    num_frames, height, width = map(int, shape.split("x"))
    checkpoint, watch, prompts = resolve("toyland"), Watch(), held_out()
    pictures = folder / "first-frames"

    def planned(index: int, asked: str) -> Plan:
        return plan(
            GenerateRequest(
                prompt=prompts[index].text,
                seed=index % len(prompts),
                num_frames=num_frames,
                height=height,
                width=width,
                num_inference_steps=steps,
                attention=asked,
                image=picture(index) if from_images else None,
            ),
            checkpoint,
        )

    def picture(index: int) -> Path:
        """Return the file of the first frame of a prompt's true clip."""
        number = index % len(prompts)
        path = pictures / f"{number:03d}-{width}x{height}.png"
        if not path.exists():
            pictures.mkdir(parents=True, exist_ok=True)
            first = render([prompts[number].clip], num_frames=1, height=height, width=width).frames[0]
            video.save(first.numpy(), path, fps=1)
        return path / "00000.png"

    num_steps = planned(0, "dense").num_inference_steps
    folder = folder / f"{shape}-{num_steps}-steps"
    file = folder / f"tile-{threshold:g}.json"
    # Searched on a prompt that is not among those of the table.
    searched = kept(file, lambda: tile_search.search([planned(-1, "dense")], threshold, file, watch=watch))
    backbone = run.load(planned(0, "dense"), watch=watch)

    def made(index: int, method: str) -> dict[str, Any]:
        """Return a video and what is told of it, from its file where there is one."""
        name = f"{method}-{threshold:g}" if method == SEARCHED else method
        path = folder / name.replace(":", "-") / f"{index:03d}.npz"
        if not path.exists():
            wanted = planned(index, f"{SEARCHED}={file}" if method == SEARCHED else method)
            sparse = text_to_video.sparse_attention(wanted, backbone)
            assert sparse is not None
            sparse.measured_steps = frozenset({num_steps - 1})
            generation = text_to_video.generate(wanted, backbone, sparse=sparse)
            recalls = [one for found in sparse.account.recalls.values() for one in found]
            told = {
                "kernel": sparse.bound,
                "sparsity": sparse.account.sparsity,
                "sparsity_when_sparse": sparse.account.sparsity_when_sparse,
                "recall": statistics.mean(recalls) if recalls else None,
                "denoise_s": generation.timings["denoise"] - sparse.account.measuring,
                "attention_s": sparse.account.seconds,
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic(path) as part, part.open("wb") as stream:
                np.savez_compressed(stream, frames=generation.frames, told=json.dumps(told))
            print(f"{path}: {sum(generation.timings.values()):.0f} s", file=sys.stderr, flush=True)
        with np.load(path) as loaded:
            return {"frames": torch.from_numpy(loaded["frames"]), **json.loads(str(loaded["told"]))}

    # Prompt by prompt, so that what is there when a run is stopped is as much of every method.
    rows = [{method: made(index, method) for method in methods} for index in range(num_prompts)]
    truths = [truth(prompt.clip) for prompt in prompts[:num_prompts]]
    fps = planned(0, "dense").fps
    read = {method: read_all([one[method]["frames"].numpy() for one in rows], fps) for method in methods}
    right = {method: all_right(readings, truths) for method, readings in read.items()}
    return {
        "shape": shape,
        "tokens": list(backbone.token_grid(num_frames, height, width)),
        "steps": num_steps,
        "prompts": num_prompts,
        "threshold": threshold,
        "searched": [layer["global"] for layer in searched["layers"]],
        "methods": {
            method: row([one[method] for one in rows], [one["dense"] for one in rows])
            | {"score": score(read[method], truths), **gained(right[method], right["dense"])}
            for method in methods
        },
    }


def row(ours: list[dict[str, Any]], dense: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what is told of a method's videos, against the dense ones: means, and medians of ratios."""

    def mean(name: str) -> float | None:
        values = [one[name] for one in ours if one[name] is not None]
        return round(statistics.mean(values), 4) if values else None

    def speedup(name: str) -> float:
        return round(statistics.median(two[name] / one[name] for one, two in zip(ours, dense, strict=True)), 3)

    pairs = [(one["frames"], two["frames"]) for one, two in zip(ours, dense, strict=True)]
    same = all(torch.equal(*pair) for pair in pairs)  # dense itself, or a plan that leaves nothing out
    return {
        "kernel": ours[0]["kernel"],
        "psnr": None if same else round(statistics.mean(psnr(*pair) for pair in pairs), 2),
        "lowest_psnr": None if same else round(min(psnr(*pair) for pair in pairs), 2),
        "ssim": None if same else round(statistics.mean(ssim(*pair) for pair in pairs), 4),
        "sparsity": mean("sparsity"),
        "sparsity_when_sparse": mean("sparsity_when_sparse"),
        "recall": mean("recall"),
        "denoise_s": round(statistics.median(one["denoise_s"] for one in ours), 2),
        "denoise_speedup": speedup("denoise_s"),
        "attention_speedup": speedup("attention_s"),
    }


def kernel_rows(folder: Path, tokens: list[int], repeats: int) -> list[dict[str, Any]]:
    """Return how much of the ideal the machine's kernel reaches, for each length, width, block and density."""
    return [
        kept(
            folder / f"{length}-{head_dim}-{block}-{density:g}.json",
            lambda length=length, head_dim=head_dim, block=block, density=density: {
                "tokens": length,
                "head_dim": head_dim,
                **bench_attention(
                    Shape(tokens=length, heads=HEADS, head_dim=head_dim),
                    density,
                    kernel="auto",
                    block=block,
                    repeats=repeats,
                    chosen=runtime.choose(),
                ),
            },
        )
        for length in tokens
        for head_dim in (64, 128)
        for block in (64, 128)
        for density in (0.1, 0.2)
    ]


def scaling_row(grid: tuple[int, int, int], repeats: int, head_dim: int = 64) -> dict[str, Any]:
    """Return seconds of attention alone on a grid of tokens: dense, tile with as many global frames, and radial."""
    chosen = runtime.choose()
    length = grid[0] * grid[1] * grid[2]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, HEADS, length, head_dim, generator=generator).to(chosen.device, chosen.torch_dtype)
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
                    num_heads=HEADS)  # fmt: skip
        mask = pattern.choose(*parts, layout, site).mask
        assert mask is not None
        module = kernels.load(kernels.choose("auto", chosen.device, pattern.block))
        calls[asked] = functools.partial(module.attend, *parts, mask, site.scale)
        sparsity[asked] = round(mask.sparsity, 4)
    seconds = in_turns(calls, repeats, chosen)
    return {
        "tokens": length,
        "seconds": {name: round(took, 5) for name, took in seconds.items()},
        "sparsity": sparsity,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--shape", default=SHAPE, help="Frames x height x width of the videos.")
    parser.add_argument("--steps", type=int, help="Denoising steps of the videos. Default: the model's.")
    parser.add_argument("--threshold", type=float, default=0.01, help="Of the search for tile:plan.")
    parser.add_argument("--method", action="append", choices=METHODS, help="Of videos and images, besides dense.")
    parser.add_argument("--tokens", type=int, action="append", help="Of kernels; repeat it. Default: 8192 and 16384.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/attention"))
    asked = parser.parse_args()
    parts = asked.only or PARTS
    chosen = runtime.choose()
    found: dict[str, Any] = {
        "machine": f"{cpu_name()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}",
        "runtime": asdict(chosen),
        "kernel": kernels.bound(kernels.choose("auto", chosen.device, 64)),
    }
    folder: Path = asked.folder
    long = functools.partial(
        videos,
        shape=asked.shape,
        num_prompts=asked.prompts,
        steps=asked.steps,
        threshold=asked.threshold,
        methods=[name for name in METHODS if name == "dense" or name in (asked.method or METHODS)],
    )
    if "videos" in parts:
        found["videos"] = long(folder / "videos")
    if "images" in parts:
        found["images"] = long(folder / "images", from_images=True)
    if "kernels" in parts:
        found["kernels"] = kernel_rows(folder / "kernels", asked.tokens or [8192, 16384], asked.repeats)
    if "scaling" in parts:
        rows = [
            kept(
                folder / "scaling" / f"{grid[0] * grid[1] * grid[2]}.json",
                functools.partial(scaling_row, grid, asked.repeats),
            )
            for grid in GRIDS
        ]
        growth = {name: round(took / rows[0]["seconds"][name], 2) for name, took in rows[-1]["seconds"].items()}
        found["scaling"] = {"rows": rows, "growth": growth}
    if "blocks" in parts:
        found["blocks"] = [
            kept(
                folder / "blocks" / f"{model}.json",
                functools.partial(bench_block, model, "adaspa:sparsity=0.8", repeats=1, chosen=chosen),
            )
            for model in MODELS
        ]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
