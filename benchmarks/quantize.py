"""Measures what each scheme loses on Toyland; prints one JSON object, and a table to stderr.

    python benchmarks/quantize.py --prompts 256 --workers 2 > benchmarks/results/quantize.json

A row is a scheme: the score of the videos of the first held-out prompts with its binomial standard error, what its
joint score is away from the original's, PSNR and SSIM against the original's videos of the same prompts and seeds, and
the bytes of the quantized layers as a share of bfloat16's. Both models make the same prompts, so that the difference
has an error of its own, of the videos on which they disagree, and that is smaller. `w4a8` is there plainly rounded to
the nearest as well, so that one sees what balancing is worth; `--rows all` adds what lies between.

Settings are the defaults; videos are made some at a time, all rows of these prompts before the next ones. Each is a
line of a file as soon as it is read: a run that was stopped goes on, and `--report` tells what is there, of however
many prompts. How fast schemes are is for `vgen bench quantize`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toyland import cpu_name

from vgen import backbones, checkpoints, manifest, runtime
from vgen.backbones import Backbone
from vgen.compiling import compile_blocks
from vgen.metrics.fidelity import psnr, ssim
from vgen.pipelines import quantize as pipeline
from vgen.pipelines import text_to_video
from vgen.pipelines.evaluate.scores import all_right, deviation, gained, read_all, score
from vgen.pipelines.run import Watch
from vgen.plan import Plan
from vgen.quantization import export
from vgen.quantization import plan as quantizing
from vgen.quantization.calibration import Statistics
from vgen.quantization.plan import QuantizePlan
from vgen.quantization.request import QuantizeRequest
from vgen.sampling import SAMPLERS
from vgen.sampling.guidance import classifier_free
from vgen.toyland.prompts import held_out, truth

ORIGINAL = "bfloat16"
ROWS = {
    ORIGINAL: None,
    "w8a8": "w8a8",
    "w4a8, rounded to the nearest, a scale per channel": "w4a8:group=0,balance=false,clip=false,compensate=false",
    "w4a8, balanced": "w4a8",
    "w4a8-mp, 5 bits": "w4a8-mp:bits=5",
    "w4a8-mp, 6 bits": "w4a8-mp:bits=6",
}
BETWEEN = {
    "w4a8, groups of 64": "w4a8:balance=false,clip=false,compensate=false",
    "w4a8, groups of 64, searched scales": "w4a8:balance=false,compensate=false",
    "w4a8, groups of 64, searched scales, balanced": "w4a8:compensate=false",
    "w4a16": "w4a16",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model of the table, and the bytes of its quantized layers as a share of bfloat16's."""

    backbone: Backbone
    share: float


def planned(scheme: str | None, num_prompts: int) -> QuantizePlan:
    """Return what `vgen quantize` would do: its calibration, and its videos of held-out prompts."""
    asked = QuantizeRequest(
        model="toyland", scheme=scheme or "w8a8", output=Path("export"), compare=num_prompts, device="cpu",
        dtype="bfloat16",
    )  # fmt: skip
    return quantizing.plan(asked, checkpoints.resolve("toyland"))


@functools.cache
def statistics() -> Statistics:
    """Return what the original's layers see, the same for all schemes."""
    plan = planned("w4a8", 1)
    return pipeline.calibrate(backbones.load(plan.checkpoint, runtime.choose("cpu", "bfloat16")), plan, Watch())


@functools.cache
def row(name: str, compiled: bool) -> Row:
    """Return a model of the table, quantized as its scheme says."""
    scheme = {**ROWS, **BETWEEN}[name]
    plan = planned(scheme, 1)
    backbone = backbones.load(plan.checkpoint, runtime.choose("cpu", "bfloat16"))
    layers_share = 1.0
    if scheme is not None:
        seen = statistics() if plan.scheme.is_calibrated else Statistics()
        formats, _ = pipeline.quantize_layers(backbone, plan, seen, Watch())
        layers_share = export.sizes(plan.checkpoint, plan.layers, formats).share
    if compiled:
        compile_blocks(backbone)
    return Row(backbone=backbone, share=layers_share)


def videos(plans: Sequence[Plan], backbone: Backbone) -> list[Tensor]:
    """Return the frames uint8 [F, H, W, 3] of plans that differ in prompts and seeds, made at once."""
    first = plans[0]
    shots = [text_to_video.shot_of(plan) for plan in plans]
    with torch.inference_mode():
        text = torch.cat(backbone.encode_prompt([plan.prompt for plan in plans]))
        (negative,) = backbone.encode_prompt([first.negative_prompt])
        flow = classifier_free(
            functools.partial(backbone.velocity, shot=shots[0]),
            text,
            negative.expand(len(plans), -1, -1),
            first.cfg_scale,
        )
        noise = torch.cat([backbone.noise(shot) for shot in shots])
        latents = SAMPLERS[first.sampler](flow, noise, backbone.sigmas(first.num_inference_steps, shots[0]))
        return list(backbone.decode(latents, shots[0]))


def measured(names: Sequence[str], first: int, num: int, compiled: bool) -> list[dict[str, Any]]:
    """Return a line per row and prompt, for so many prompts from the first on."""
    plans = planned(None, first + num).comparison[first:]
    lines = []
    original = videos(plans, row(ORIGINAL, compiled).backbone)
    for name in names:
        made = original if name == ORIGINAL else videos(plans, row(name, compiled).backbone)
        readings = read_all([frames.numpy() for frames in made], plans[0].fps)
        for index, (frames, reading) in enumerate(zip(made, readings, strict=True)):
            lines.append(
                {
                    "key": key(name, compiled),
                    "row": name,
                    "prompt": first + index,
                    "share": row(name, compiled).share,
                    "reading": reading.to_dict(),
                    "psnr": None if name == ORIGINAL else psnr(original[index], frames),
                    "ssim": None if name == ORIGINAL else ssim(original[index], frames),
                }
            )
    return lines


@functools.cache
def key(name: str, compiled: bool) -> str:
    """Return what tells a row's lines from those of another checkpoint or scheme, or of other defaults."""
    plan = planned({**ROWS, **BETWEEN}[name], 1)
    told = [plan.asked, plan.comparison[0].to_dict(), compiled]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def done(folder: Path, names: Sequence[str], compiled: bool) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the lines that are there, by row and prompt; those of anything else are passed over."""
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    path = folder / "videos.jsonl"
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        line = json.loads(text)
        if line["row"] in found and line["key"] == key(line["row"], compiled):
            found[line["row"]][line["prompt"]] = line
    return found


def report(found: dict[str, dict[int, dict[str, Any]]], num_prompts: int, compiled: bool) -> dict[str, Any]:
    """Return the table, of the prompts of which all rows have a video."""
    shared = set(range(num_prompts)).intersection(*(lines.keys() for lines in found.values()))
    prompts = sorted(shared)
    clips = held_out()
    truths = [truth(clips[index].clip) for index in prompts]
    readings = {name: [lines[index]["reading"] for index in prompts] for name, lines in found.items()}
    right = {name: all_right(readings[name], truths) for name in found}
    rows: dict[str, Any] = {}
    for name, lines in found.items() if prompts else ():
        both = [lines[index] for index in prompts]
        rows[name] = {
            "scheme": {**ROWS, **BETWEEN}[name],
            "layers_share": round(both[0]["share"], 4),
            "bits_per_weight": round(16 * both[0]["share"], 3),
            "score": score(readings[name], truths),
            "joint_error": round(deviation(right[name]), 4),
        }
        if name != ORIGINAL:
            rows[name] |= {
                **gained(right[name], right[ORIGINAL]),
                "psnr": round(sum(line["psnr"] for line in both) / len(both), 2),
                "ssim": round(sum(line["ssim"] for line in both) / len(both), 4),
            }
    machine = f"{cpu_name()}, {os.cpu_count()} processors, torch {torch.__version__}"
    model = manifest.identity(checkpoints.resolve("toyland"))
    weights = next(file["sha256"] for file in model["files"] if file["path"].startswith("transformer/diffusion"))
    told = {"machine": machine, "transformer_sha256": weights, "compiled": compiled, "prompts": len(prompts)}
    return {**told, "rows": rows}


def table(told: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the report for people, in points of 100."""
    yield f"| {told['prompts']} prompts | of bfloat16 | joint | against bfloat16 | PSNR | SSIM |"
    yield "|---" * 6 + "|"
    for name, found in told["rows"].items():
        size = f"{found['layers_share']:.3f}"
        joint = f"{100 * found['score']['joint']:.1f} ± {100 * found['joint_error']:.1f}"
        against = ["", "", ""]
        if name != ORIGINAL:
            change = f"{100 * found['joint_gained']:+.1f} ± {100 * found['joint_gained_error']:.1f}"
            against = [change, f"{found['psnr']:.1f}", f"{found['ssim']:.3f}"]
        yield f"| {' | '.join([name, size, joint, *against])} |"


def begin(num_threads: int) -> None:
    """Prepare a worker."""
    torch.set_num_threads(num_threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rows", default=",".join(map(str, range(len(ROWS)))), help="all, or numbers with commas")
    parser.add_argument("--at-once", type=int, default=8, help="prompts")
    parser.add_argument("--workers", type=int, default=1, help="processes, which share the threads")
    parser.add_argument("--compile", action="store_true", help="sooner done, and rounded otherwise in places")
    parser.add_argument("--folder", type=Path, default=Path("runs/quantize"))
    parser.add_argument("--report", action="store_true", help="only tell what is there")
    arguments = parser.parse_args()
    every = list({**ROWS, **BETWEEN})
    numbers = range(len(every)) if arguments.rows == "all" else sorted({0, *map(int, arguments.rows.split(","))})
    names = [every[number] for number in numbers]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found = done(arguments.folder, names, arguments.compile)

    starts = range(0, 0 if arguments.report else arguments.prompts, arguments.at_once)
    wanted = []
    for start in starts:
        num = min(arguments.at_once, arguments.prompts - start)
        lacking = [name for name in names if not found[name].keys() >= set(range(start, start + num))]
        if lacking:
            wanted.append((lacking, start, num, arguments.compile))
    begun = time.perf_counter()
    threads = max(1, torch.get_num_threads() // arguments.workers)
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(arguments.workers, mp_context=spawn, initializer=begin, initargs=(threads,)) as workers,
        (arguments.folder / "videos.jsonl").open("a", encoding="utf-8") as file,
    ):
        for index, batch in enumerate(as_completed([workers.submit(measured, *task) for task in wanted])):
            for line in batch.result():
                found[line["row"]][line["prompt"]] = line
                print(json.dumps(line), file=file, flush=True)
            seconds = time.perf_counter() - begun
            print(f"{index + 1} of {len(wanted)} batches, {seconds:.0f} s", file=sys.stderr, flush=True)

    told = report(found, arguments.prompts, arguments.compile)
    print("\n".join(table(told)), file=sys.stderr)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
