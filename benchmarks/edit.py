"""Compares the ways to edit a clip: what a round trip loses, and how well edits of held-out clips go.

    python benchmarks/edit.py --pairs 50 -o outputs/benchmark-edit > benchmarks/results/edit.json

Edits are those of `vgen eval edit`, whose videos, report and sheet are in the folder; a run that was stopped goes on.
The table is printed to stderr. Seconds are of this machine, and mean little while it does other things.
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

from vgen import backbones, checkpoints
from vgen.cli import progress
from vgen.metrics import fidelity
from vgen.pipelines import evaluate
from vgen.pipelines.evaluate import edit, trials
from vgen.runtime import choose, noise_generator
from vgen.sampling.inversion import SOLVERS, evaluations, invert
from vgen.toyland.renderer import render

# Solver and steps: about 60 evaluations there and back, half and twice as many.
ROUND_TRIPS = [
    (name, steps * factor // 2)
    for name, steps in (("euler", 30), ("fireflow", 29), ("rf-solver", 15))
    for factor in (1, 2, 4)
]


def round_trips(model: str, count: int, dtype: str) -> list[dict[str, Any]]:
    """Return what the way to noise and back loses of the first clips, by the source prompt and without guidance."""
    backbone = backbones.load(checkpoints.resolve(model), choose("auto", dtype))
    defaults = backbone.checkpoint.defaults
    height, width, num_frames, fps = defaults.height, defaults.width, defaults.num_frames, defaults.fps
    shot = backbones.Shot(num_frames=num_frames, height=height, width=width, fps=fps, generator=noise_generator(0))
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with torch.inference_mode():
        for pair in edit.pairs(count):
            clip = render([pair.source], num_frames=num_frames, height=height, width=width, fps=fps).frames
            data = backbone.encode_frames(clip)
            best = backbone.decode(data, shot)[0].cpu()
            (text,) = backbone.encode_prompt([pair.prompts[0]])
            velocity = functools.partial(backbone.velocity, text=text, shot=shot, guidance_scale=1.0)
            for name, steps in ROUND_TRIPS:
                sigmas = backbone.sigmas(steps, shot)
                noise = invert(SOLVERS[name], velocity, data, sigmas)
                back = SOLVERS[name](velocity, noise, sigmas)
                lost = float((back - data).square().mean().sqrt())
                quality = fidelity.psnr(backbone.decode(back, shot)[0].cpu(), best)
                found.setdefault((name, steps), []).append((lost, quality))
    return [
        {
            "solver": name,
            "steps": steps,
            "evaluations": 2 * sum(map(len, evaluations(SOLVERS[name], torch.linspace(1, 0, steps + 1)))),
            "latent_error": round(math.exp(sum(math.log(lost) for lost, _ in values) / len(values)), 5),
            "psnr_db": round(sum(quality for _, quality in values) / len(values), 2),
            "lowest_psnr_db": round(min(quality for _, quality in values), 2),
        }
        for (name, steps), values in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="toyland")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--round-trips", type=int, default=5, help="How many clips go there and back.")
    parser.add_argument("--only", action="append", default=[], help="One of the ways to edit; repeat it for several.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/benchmark-edit"))
    asked = parser.parse_args()
    trips = round_trips(asked.model, asked.round_trips, asked.dtype)
    task = trials.Evaluation(
        task="edit",
        folder=asked.output,
        num_prompts=asked.pairs,
        seed=0,
        model=asked.model,
        given={"dtype": asked.dtype},
        only=tuple(asked.only),
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
