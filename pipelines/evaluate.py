"""How well a model follows prompts: held-out prompts → videos → readings, beside the ceiling and the floor."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import batch, checkpoints, files, manifest
from vgen.batch import PromptLine
from vgen.errors import UsageError, VgenError
from vgen.pipelines import run
from vgen.pipelines.run import Job, Report, Watch
from vgen.request import GenerateRequest, Plan
from vgen.toyland.prompts import ATTRIBUTES, Prompt, held_out, truth

if TYPE_CHECKING:
    from vgen.toyland.probes import Readings
    from vgen.video import Frames

REPORT, SHEET = "report.json", "sheet.png"
SHEET_ROWS = 24
READ_AT_ONCE = 16  # videos
# What a trial takes from the embedded checkpoint's defaults, whatever the model: all are scored alike.
SETTINGS = ("width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A held-out prompt, the video that the model makes of it, and its real one after the model's VAE."""

    prompt: Prompt
    made: Job
    real: Job


def trials(folder: Path, *, num_prompts: int, seed: int, model: str, given: dict[str, Any]) -> list[Trial]:
    """Return the first `num_prompts` trials with the videos' places in `folder`; prompt i has seed `seed` + i.

    `given` are fields of a request that take the place of Toyland's defaults. Raises `UsageError` for more prompts
    than there are, or fewer than two, which cannot be shuffled.
    """
    prompts = held_out()
    if not 2 <= num_prompts <= len(prompts):
        raise UsageError(f"{num_prompts} prompts are not possible.", tip=f"choose --prompts from 2 to {len(prompts)}.")
    usual = asdict(checkpoints.resolve("toyland").defaults)
    fields = {name: usual[name] for name in SETTINGS} | given
    asked = [
        PromptLine(number=None, request=GenerateRequest(prompt=prompt.text, model=model, seed=seed + index, **fields))
        for index, prompt in enumerate(prompts[:num_prompts])
    ]
    planned, _ = batch.plan_lines(asked, [])
    return [
        Trial(
            prompt=prompt,
            made=Job(plan=line.plan, output=folder / "made" / f"{index:03d}.mp4"),
            real=Job(
                plan=line.plan,
                output=folder / "real" / f"{index:03d}.mp4",
                source=functools.partial(real, prompt, line.plan),
            ),
        )
        for index, (prompt, line) in enumerate(zip(prompts[:num_prompts], planned, strict=True))
    ]


def real(prompt: Prompt, plan: Plan) -> Frames:
    """Return the rendered clip of a prompt at a plan's size, length and frame rate."""
    from vgen.toyland.renderer import render

    clips = [prompt.clip]
    rendered = render(clips, num_frames=plan.num_frames, height=plan.height, width=plan.width, fps=plan.fps)
    return rendered.frames[0].numpy()


def missing(found: Sequence[Trial]) -> list[Job]:
    """Return the jobs whose video is not there yet; raise `VgenError` where another model or setting made it."""
    lacking = []
    identity = manifest.identity(found[0].made.plan.checkpoint)
    for job in [job for trial in found for job in (trial.made, trial.real)]:
        if not job.output.exists():
            lacking.append(job)
            continue
        made = manifest.read(job.output)
        anywhere = ("device", "dtype", "model")
        asked = {key: value for key, value in job.plan.to_dict().items() if key not in anywhere}
        was = {key: value for key, value in made["request"].items() if key not in anywhere}
        if was != asked or made["checkpoint"] != identity:
            raise VgenError(
                f"{job.output} was made by another model, or with other settings.", tip="choose another --output."
            )
    return lacking


def evaluate(folder: Path, found: Sequence[Trial], jobs: Sequence[Job], *, watch: Watch) -> dict[str, Any]:
    """Run the jobs that are `missing`, read all videos, and return the report, which is in `folder` too, with a sheet.

    Its keys `scene`, `colour`, `shape`, `size`, `action`, `camera` and `joint` are the shares of videos in which the
    probes read what the prompt says; `ceiling` has the same of real clips after the model's VAE, and `floor` of the
    model's videos against the other prompts. What cannot be read counts as wrong.
    """
    for parent in {job.output.parent for job in jobs}:
        parent.mkdir(parents=True, exist_ok=True)
    account = run.generate(jobs, watch=watch)
    from vgen import video

    made = [video.read(trial.made.output).frames for trial in found]
    genuine = [video.read(trial.real.output).frames for trial in found]
    fps = found[0].made.plan.fps
    both = read_all([*made, *genuine], fps)
    readings, of_real = both[: len(made)], both[len(made) :]
    truths = [truth(trial.prompt.clip) for trial in found]
    report = {
        **score(readings, truths),
        "flicker": mean_flicker(made),
        "ceiling": {**score(of_real, truths), "flicker": mean_flicker(genuine)},
        "floor": floor(readings, truths),
        "without_learning": {"made": plain_score(made, truths), "real": plain_score(genuine, truths)},
        **facts(folder, found, account),
        "videos": [
            {
                "output": str(trial.made.output),
                "prompt": trial.prompt.text,
                "seed": trial.made.plan.seed,
                "truth": told,
                "reading": reading.to_dict(),
                "confidence": {name: round(value, 3) for name, value in reading.confidences.items()},
                "ceiling": genuine_reading.to_dict(),
            }
            for trial, told, reading, genuine_reading in zip(found, truths, readings, of_real, strict=True)
        ],
    }
    files.write_text(folder / REPORT, json.dumps(report, indent=1) + "\n")
    draw_sheet(folder / SHEET, found, made, genuine, readings)
    return report


def facts(folder: Path, found: Sequence[Trial], account: Report) -> dict[str, Any]:
    """Return what tells how a score came about: the model, the settings, the seeds, the costs of this run."""
    plan = found[0].made.plan
    settings = (*SETTINGS, "sampler", "negative_prompt")
    return {
        "model": plan.model,
        "checkpoint": manifest.identity(plan.checkpoint),
        "prompts": len(found),
        "seeds": [trial.made.plan.seed for trial in found],
        "settings": {name: getattr(plan, name) for name in settings},
        "report": str(folder / REPORT),
        "sheet": str(folder / SHEET),
        "newly_made": len(account.made),
        "timings": {stage: round(seconds, 3) for stage, seconds in account.timings.items()},
    }


def read_all(videos: Sequence[Frames], fps: float) -> list[Readings]:
    """Return the probes' readings of videos."""
    from vgen.toyland import probes

    shipped = probes.load()
    groups = [videos[start : start + READ_AT_ONCE] for start in range(0, len(videos), READ_AT_ONCE)]
    return [reading for group in groups for reading in shipped.read(group, fps)]


def score(readings: Sequence[Readings], truths: Sequence[dict[str, str]]) -> dict[str, float]:
    """Return the share of videos in which each attribute is read and right, and all of them are (`joint`)."""
    pairs = list(zip(readings, truths, strict=True))
    right = [{name: reading[name] == told[name] for name in ATTRIBUTES} for reading, told in pairs]
    shares = {name: share(one[name] for one in right) for name in ATTRIBUTES}
    return {**shares, "joint": share(all(one.values()) for one in right)}


def floor(readings: Sequence[Readings], truths: Sequence[dict[str, str]]) -> dict[str, float]:
    """Return the score of the readings against every other prompt's truth: what a model gets that reads no prompt."""
    pairs = [(one, two) for one in range(len(truths)) for two in range(len(truths)) if one != two]
    return score([readings[one] for one, _ in pairs], [truths[two] for _, two in pairs])


def plain_score(videos: Sequence[Frames], truths: Sequence[dict[str, str]]) -> dict[str, float]:
    """Return the share of videos whose scene the palettes tell right, and of those with a solid, whose colour."""
    from vgen.toyland import readings

    solids = [(frames, told) for frames, told in zip(videos, truths, strict=True) if told["shape"] != "head"]
    return {
        "scene": share(readings.scene(frames) == told["scene"] for frames, told in zip(videos, truths, strict=True)),
        "colour": share(readings.colour(frames) == told["colour"] for frames, told in solids),
    }


def mean_flicker(videos: Sequence[Frames]) -> float:
    """Return the mean of `readings.flicker`."""
    from vgen.toyland import readings

    return round(sum(map(readings.flicker, videos)) / len(videos), 5)


def share(right: Iterable[bool]) -> float:
    """Return the share of true values; 0 of none."""
    values = list(right)
    return round(sum(values) / len(values), 4) if values else 0.0


def draw_sheet(
    path: Path, found: Sequence[Trial], made: Sequence[Frames], genuine: Sequence[Frames], readings: Sequence[Readings]
) -> None:
    """Write a picture of the first trials: the model's frames, the real ones, the prompt and what was read wrong."""
    import torch

    from vgen.toyland.samples import labelled_sheet

    labels = []
    for trial, reading in zip(found, readings, strict=True):
        told = truth(trial.prompt.clip)
        wrong = [f"{name}: {reading[name] or 'unreadable'}" for name in ATTRIBUTES if reading[name] != told[name]]
        labels.append(f"{trial.prompt.text}   [{'; '.join(wrong) or 'all right'}]")
    rows = [[torch.tensor(frames) for frames in pair] for pair in zip(made, genuine, strict=True)]
    with files.atomic(path) as part:
        labelled_sheet(rows[:SHEET_ROWS], labels[:SHEET_ROWS]).save(part)
