"""Compares the ways to edit a clip: what a round trip loses, and how well edits of held-out clips go.

    python benchmarks/edit.py --pairs 50 -o outputs/benchmark-edit > benchmarks/results/edit.json

Edits are those of `vgen eval edit`, whose videos, report and sheet are in the folder. Each video and each round trip
is kept there as soon as it is made, and a run that was stopped goes on. The table is printed to stderr. Seconds are of
this machine, and mean little while it does other things.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from toyland import cpu_name

from vgen import backbones, checkpoints, files, manifest
from vgen.cli import progress
from vgen.errors import VgenError
from vgen.metrics import fidelity
from vgen.pipelines import evaluate
from vgen.pipelines.evaluate import edit, trials
from vgen.runtime import choose, noise_generator
from vgen.sampling.inversion import SOLVERS, evaluations, invert
from vgen.toyland.renderer import render

# Solver and steps: 30, 60 and 120 evaluations there and back, or nearly so.
ROUND_TRIPS = {"euler": (15, 30, 60), "fireflow": (14, 29, 59), "rf-solver": (7, 15, 30)}
FIRST = ("fireflow", "fireflow-fresh", "rf-solver", "rf-edit", "flowedit", "sdedit")


def round_trips(model: str, count: int, dtype: str, kept: Path) -> dict[str, list[float]]:
    """Return what the way to noise and back loses of the first clips, by the source prompt and without guidance.

    The root mean square of latents and the PSNR of frames in dB, by "solver steps clip". What `kept` has of them is
    not made again, and all of them are kept there as they are made.
    """
    checkpoint = checkpoints.resolve(model)
    identity = {"checkpoint": manifest.identity(checkpoint), "dtype": dtype}
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {**identity, "lost": {}}
    if any(found[name] != value for name, value in identity.items()):
        raise VgenError(f"{kept} was made by another model or in another dtype.", tip="choose another --output.")
    lost: dict[str, list[float]] = found["lost"]
    asked = [(name, steps) for name, several in ROUND_TRIPS.items() for steps in several]
    if all(f"{name} {steps} {clip}" in lost for name, steps in asked for clip in range(count)):
        return lost
    backbone = backbones.load(checkpoint, choose("auto", dtype))
    defaults = checkpoints.resolve("toyland").defaults  # as for the edits, whatever the model
    height, width, num_frames, fps = defaults.height, defaults.width, defaults.num_frames, defaults.fps
    shot = backbones.Shot(num_frames=num_frames, height=height, width=width, fps=fps, generator=noise_generator(0))
    with torch.inference_mode():
        for number, pair in enumerate(edit.pairs(count)):
            clip = render([pair.source], num_frames=num_frames, height=height, width=width, fps=fps).frames
            data = backbone.encode_frames(clip)
            best = backbone.decode(data, shot)[0].cpu()
            (text,) = backbone.encode_prompt([pair.prompts[0]])
            velocity = functools.partial(backbone.velocity, text=text, shot=shot, guidance_scale=1.0)
            for name, steps in asked:
                if (key := f"{name} {steps} {number}") in lost:
                    continue
                sigmas = backbone.sigmas(steps, shot)
                back = SOLVERS[name](velocity, invert(SOLVERS[name], velocity, data, sigmas), sigmas)
                error = float((back - data).square().mean().sqrt())
                lost[key] = [error, fidelity.psnr(backbone.decode(back, shot)[0].cpu(), best)]
                files.write_text(kept, json.dumps(found) + "\n")
                print(f"round trip {key}: {lost[key][1]:.1f} dB", file=sys.stderr, flush=True)
    return lost


def summed(lost: dict[str, list[float]], count: int) -> list[dict[str, Any]]:
    """Return a row for each solver and number of steps; `order` is that of the latents' error since the row before."""
    rows: list[dict[str, Any]] = []
    for name, several in ROUND_TRIPS.items():
        before: tuple[int, float] | None = None
        for steps in several:
            values = [lost[f"{name} {steps} {clip}"] for clip in range(count)]
            error = math.exp(sum(math.log(error) for error, _ in values) / count)
            grid = torch.linspace(1, 0, steps + 1)
            row = {
                "solver": name,
                "steps": steps,
                "evaluations": 2 * sum(map(len, evaluations(SOLVERS[name], grid))),
                "latent_error": round(error, 5),
                "psnr_db": round(sum(quality for _, quality in values) / count, 2),
                "lowest_psnr_db": round(min(quality for _, quality in values), 2),
            }
            if before is not None:
                row["order"] = round(math.log(before[1] / error) / math.log(steps / before[0]), 2)
            before = steps, error
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="toyland")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--round-trips", type=int, default=3, help="How many clips go there and back, in float32.")
    parser.add_argument(
        "--only", action="append", default=[], help=f"A way to edit, or several: {', '.join(edit.WAYS)}."
    )
    parser.add_argument("--dtype", default="auto", help="That of the edits.")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/benchmark-edit"))
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    lost = round_trips(asked.model, asked.round_trips, "float32", asked.output / "round-trips.json")
    trips = summed(lost, asked.round_trips)
    task = trials.Evaluation(
        task="edit",
        folder=asked.output,
        num_prompts=asked.pairs,
        seed=0,
        model=asked.model,
        given={"dtype": asked.dtype},
        only=tuple(asked.only or FIRST),
    )
    found = edit.TASK.trials(task)
    jobs = trials.missing(found)
    with progress.shown(len(jobs)) as watch:
        report = evaluate.evaluate(task, found, jobs, watch=watch)
    columns = edit.TASK.columns
    print("| way | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|", sep="\n", file=sys.stderr)
    for name, row in edit.table(report):
        print(f"| {name} | " + " | ".join(str(row.get(column, "")) for column in columns) + " |", file=sys.stderr)
    kept = ("model", "checkpoint", "prompts", "settings", "edits", "ceiling", "unedited")
    told = {name: report[name] for name in kept}
    told["checkpoint"] = {name: told["checkpoint"][name] for name in ("name", "family", "repo", "revision")}
    machine = f"{cpu_name()}, {os.cpu_count()} processors"
    print(json.dumps({"machine": machine, "round_trips": trips, **told}, indent=1))


if __name__ == "__main__":
    main()
