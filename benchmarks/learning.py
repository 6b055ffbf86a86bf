"""Scores the weights that a base run kept (`vgen train base --keep`), and plots loss and score against steps.

    python benchmarks/learning.py --vae runs/vae/vae --run runs/images --run runs/videos --plot docs/learning.png

Runs follow each other: the steps of a later one are counted on. Of a run that kept nothing, the last weights are
scored. The JSON in --output has every score so far; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from toyland import cpu_name

from vgen import files, video
from vgen.pipelines import run as pipeline
from vgen.pipelines.evaluate import TASKS
from vgen.pipelines.evaluate.generate import MADE
from vgen.pipelines.evaluate.scores import mean_flicker, read_all, score
from vgen.pipelines.evaluate.trials import Evaluation
from vgen.toyland.prompts import truth
from vgen.training.base import HISTORY
from vgen.training.export import export_checkpoint

LOSS_WINDOW = 10  # lines of the log that the plotted loss is the mean of
# Colours that are told apart by people who see few (Okabe and Ito), the darkest for all attributes together.
COLOURS = {
    "scene": "#009E73",
    "colour": "#D55E00",
    "shape": "#0072B2",
    "size": "#E69F00",
    "action": "#CC79A7",
    "camera": "#56B4E9",
    "joint": "#000000",
}
WIDTH, HEIGHT, FINE = 1000, 760, 2  # the plot in pixels, and how much larger it is drawn
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A base run: its log by step, its kept weights by step, and how many steps came before it."""

    folder: Path
    log: dict[int, dict[str, float]]
    kept: dict[int, Path]
    begins: int

    @classmethod
    def of(cls, folder: Path, begins: int) -> Run:
        """Return the run in `folder`."""
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        log = {line["step"]: line for line in lines}  # after a kill some steps were taken twice: the last ones count
        kept = {int(place.name): place for place in sorted((folder / HISTORY).glob("[0-9]*"))}
        return cls(folder=folder, log=log, kept=kept or {max(log): folder}, begins=begins)

    @property
    def last(self) -> int:
        """The last step of the log or of the weights."""
        return max(*self.log, *self.kept)

    def chosen(self, every: int) -> list[int]:
        """Return each `every`-th step that has weights, and the last."""
        steps = sorted(self.kept)
        return sorted({*steps[::every], steps[-1]})

    def facts(self, step: int) -> dict[str, Any]:
        """Return what the log says at the line before `step`, the loss as plotted."""
        losses = dict(self.losses())
        logged = max((one for one in self.log if one <= step), default=min(self.log))
        return {"minutes": self.log[logged]["minutes"], "loss": round(losses[logged], 5)}

    def losses(self) -> list[tuple[int, float]]:
        """Return the loss by step: the mean of the last LOSS_WINDOW lines of the log."""
        steps = sorted(self.log)
        means = []
        for index, step in enumerate(steps):
            window = steps[max(0, index + 1 - LOSS_WINDOW) : index + 1]
            means.append((step, sum(self.log[one]["loss"] for one in window) / len(window)))
        return means


def runs_of(folders: Sequence[Path]) -> list[Run]:
    """Return the runs, each beginning where the one before ended."""
    runs: list[Run] = []
    for folder in folders:
        runs.append(Run.of(folder, runs[-1].begins + runs[-1].last if runs else 0))
    return runs


def score_weights(vae: Path, run: Run, step: int, num_prompts: int) -> dict[str, float]:
    """Return the score of a run's weights at a step, as `vgen eval` tells it, without the ceiling's videos."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "checkpoint")
        model.mkdir()
        export_checkpoint(vae, run.folder, model, weights=run.kept[step])
        asked = Evaluation(
            task="generate", folder=Path(folder, "score"), num_prompts=num_prompts, seed=0, model=str(model), given={}
        )
        trials = TASKS[asked.task].trials(asked)
        jobs = [trial.made[MADE] for trial in trials]
        jobs[0].output.parent.mkdir(parents=True)
        pipeline.generate(jobs, watch=pipeline.Watch())
        videos = [video.read(job.output).frames for job in jobs]
    readings = read_all(videos, jobs[0].plan.fps)
    return {**score(readings, [truth(trial.prompt.clip) for trial in trials]), "flicker": mean_flicker(videos)}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A part of the plot: its box (left, top, right, bottom) in pixels and the values at its sides."""

    draw: ImageDraw.ImageDraw
    box: tuple[int, int, int, int]
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, point: Point) -> Point:
        """Return where a point lies, in drawn pixels."""
        left, top, right, bottom = self.box
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (min(max(point[1], self.y[0]), self.y[1]) - self.y[0]) / (self.y[1] - self.y[0])
        return FINE * (left + across * (right - left)), FINE * (bottom - up * (bottom - top))

    def text(self, place: Point, text: str, anchor: str, fill: str = "#333333") -> None:
        """Write text at a place in pixels."""
        font = ImageFont.load_default(13 * FINE)
        self.draw.text((FINE * place[0], FINE * place[1]), text, fill=fill, font=font, anchor=anchor)

    def line(self, points: Sequence[Point], fill: str, width: int = 2, dots: bool = False) -> None:
        """Draw a line through points, with dots where they are few."""
        places = [self.at(point) for point in points]
        self.draw.line(places, fill=fill, width=width * FINE, joint="curve")
        for x, y in places if dots else []:
            radius = 3 * FINE
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

    def axes(self, title: str, digits: int) -> None:
        """Draw the frame, the ticks and the title."""
        left, top, _, bottom = self.box
        for tick in ticks(*self.y):
            y = self.at((self.x[0], tick))[1] / FINE
            self.line([(self.x[0], tick), (self.x[1], tick)], "#E4E4E4", 1)
            self.text((left - 6, y), f"{tick:.{digits}f}", "rm")
        for tick in ticks(*self.x):
            self.text((self.at((tick, self.y[0]))[0] / FINE, bottom + 6), f"{tick:,.0f}", "ma")
        self.draw.rectangle([FINE * side for side in self.box], outline="#888888", width=FINE)
        self.text((left, top - 6), title, "ls", "#000000")


def ticks(low: float, high: float) -> list[float]:
    """Return four to nine round numbers from `low` to `high`."""
    step = 10.0 ** math.floor(math.log10(high - low))
    step = next(step * part for part in (1, 0.5, 0.2, 0.1) if (high - low) / (step * part) >= 4)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def plot(path: Path, runs: Sequence[Run], points: Sequence[dict[str, Any]], num_prompts: int) -> None:
    """Draw the loss and the scores against steps; `points` are as in the JSON."""
    image = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), "white")
    draw = ImageDraw.Draw(image)
    losses = [[(run.begins + step, loss) for step, loss in run.losses()] for run in runs]
    seen = sorted(loss for line in losses for _, loss in line)
    x = (0.0, float(runs[-1].begins + runs[-1].last))
    highest = seen[int(0.97 * (len(seen) - 1))]  # the first lines of a run would flatten all others
    margin = 0.05 * (highest - seen[0]) or 0.05
    upper = Panel(draw=draw, box=(70, 40, WIDTH - 110, 290), x=x, y=(seen[0] - margin, highest + margin))
    lower = Panel(draw=draw, box=(70, 350, WIDTH - 110, HEIGHT - 50), x=x, y=(0.0, 1.0))
    upper.axes(f"Loss, the mean of {LOSS_WINDOW} lines of the log", 2)
    lower.axes(f"Share of {num_prompts} held-out prompts that the video shows", 1)
    lower.text(((lower.box[0] + lower.box[2]) / 2, HEIGHT - 14), "steps", "ms")
    for run, line in zip(runs, losses, strict=True):
        for panel in (upper, lower):
            panel.line([(run.begins, panel.y[0]), (run.begins, panel.y[1])], "#888888", 1)
        ends = upper.at((run.begins + run.last, 0))[0] / FINE
        upper.text((ends - 6, upper.box[1] + 4), run.folder.name, "ra")
        upper.line(line, "#000000")
    for index, (name, colour) in enumerate(COLOURS.items()):
        line = [(point["begins"] + point["step"], point["scores"][name]) for point in points]
        lower.line(line, colour, 3 if name == "joint" else 2, dots=True)
        y = lower.box[1] + 12 + 24 * index
        draw.line([FINE * (WIDTH - 100), FINE * y, FINE * (WIDTH - 76), FINE * y], fill=colour, width=3 * FINE)
        lower.text((WIDTH - 70, y), name, "lm")
    with files.atomic(path) as part:
        image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="the VAE's folder")
    parser.add_argument("--run", type=Path, action="append", required=True, help="a base run's folder; repeatable")
    parser.add_argument("--prompts", type=int, default=26)
    parser.add_argument("--every", type=int, default=1, help="score each so many of the kept weights, and the last")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/learning.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/learning.png"))
    given = parser.parse_args()
    runs = runs_of(given.run)
    before = (
        json.loads(given.output.read_text()) if given.output.exists() else {"prompts": given.prompts, "points": []}
    )
    if before["prompts"] != given.prompts:
        parser.error(f"{given.output} has scores of {before['prompts']} prompts: choose another --output")
    scored = {(point["run"], point["step"]): point["scores"] for point in before["points"]}
    wanted = [(run, step) for run in runs for step in run.chosen(given.every)]
    points: list[dict[str, Any]] = []
    for run, step in wanted:
        key = (run.folder.name, step)
        if key not in scored:
            print(f"{len(points) + 1}/{len(wanted)}: {key[0]}, step {step}", file=sys.stderr, flush=True)
            scored[key] = score_weights(given.vae, run, step, given.prompts)
        points.append({"run": key[0], "begins": run.begins, "step": step, **run.facts(step), "scores": scored[key]})
        found = {
            "machine": f"{cpu_name()}, {os.cpu_count()} processors",
            "prompts": given.prompts,
            "loss": f"mean of {LOSS_WINDOW} lines of the log",
            "points": points + [one for one in before["points"] if (one["run"], one["step"]) not in covered(points)],
        }
        files.write_text(given.output, json.dumps(found, indent=1) + "\n")
    plot(given.plot, runs, points, given.prompts)
    print(given.output, given.plot, sep="\n")


def covered(points: Sequence[dict[str, Any]]) -> set[tuple[str, int]]:
    """Return the runs and steps of points."""
    return {(point["run"], point["step"]) for point in points}


if __name__ == "__main__":
    main()
