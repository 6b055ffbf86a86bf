"""Editing: does the clip show what was asked for, is all else as it was, and is it better than starting from noise?

A pair is a held-out clip and the same clip with one attribute replaced, both rendered: so the attribute, the
background and the track of the edited clip have a truth. Every way of editing gets the same pairs and the same words.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import batch, manifest, outputs
from vgen.batch import PromptLine
from vgen.editing.plan import plan as edit_plan
from vgen.editing.request import EditRequest
from vgen.errors import UsageError, did_you_mean
from vgen.pipelines.evaluate.scores import mean_flicker, read_all, share, wrong
from vgen.pipelines.evaluate.trials import REAL, Evaluation, Findings, Task, Trial, rendered
from vgen.pipelines.run import Job, Watch
from vgen.plan import Plan
from vgen.request import GenerateRequest
from vgen.toyland.prompts import ATTRIBUTES, Prompt, full_caption, held_out, truth
from vgen.toyland.scene import COLOURS, SCENES, SHAPES, Clip

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.backbones import Backbone
    from vgen.pipelines.text_to_video import Generation
    from vgen.toyland.probes import Readings
    from vgen.video import Frames

GIVEN = "given"  # the folder of the clips
MARGIN = 6  # pixels around the subjects, where their shadows fall, that are no background
NEAR = 0.1  # of the picture's height: so far from its true track a subject is on it
FOUND = 0.5  # of the frames: a subject that is found in fewer has no track

CHECKED = 16  # clips of each way whose round trip is measured, too

# The ways to edit, each with fields of an `EditRequest`, and each with 40 to 52 evaluations, all counted; where not
# "none", with a mask that is found. "sdedit" is what diffusers' video-to-video pipelines do.
WAYS: dict[str, dict[str, Any]] = {
    "fireflow": {"method": "fireflow", "num_inference_steps": 15},
    "fireflow-fresh": {"method": "fireflow:fresh=0.7", "num_inference_steps": 15},
    "rf-solver": {"method": "rf-solver", "num_inference_steps": 8},
    "rf-edit": {"method": "rf-solver:begin=0.3", "num_inference_steps": 8, "inject": 2},
    "euler": {"method": "euler", "num_inference_steps": 16},
    "flowedit": {"method": "flowedit", "num_inference_steps": 16, "guidance_scale": 4.0},
    "rf-solver-whole": {"method": "rf-solver", "num_inference_steps": 8, "mask": "none"},
    "sdedit": {"method": "sdedit", "num_inference_steps": 25, "mask": "none"},
    "sdedit-mask": {"method": "sdedit", "num_inference_steps": 25},
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A clip, the clip that it is to become, and which of ATTRIBUTES they differ in."""

    attribute: str
    source: Clip
    target: Clip

    @property
    def prompts(self) -> tuple[str, str]:
        """What the two show, in words that differ where they do."""
        return full_caption(self.source, _Plain()), full_caption(self.target, _Plain())


class _Plain(random.Random):
    """Chooses the first word for everything."""

    def choice(self, seq: Any) -> Any:
        """Return the first."""
        return seq[0]


def pairs(count: int) -> list[Pair]:
    """Return pairs of held-out clips with one solid: a colour, a shape, a scene and an action changed in turn."""
    rng = random.Random(3_000_017)
    solids = [prompt.clip for prompt in held_out() if prompt.clip.subjects[0].shape != "head"]
    if not 1 <= count <= len(solids):
        raise UsageError(f"{count} edits are not possible.", tip=f"choose --prompts from 1 to {len(solids)}.")
    attributes = itertools.cycle(CHANGES)
    return [_changed(clip, attribute, rng) for clip, attribute in zip(solids[:count], attributes, strict=False)]


# Actions in which a subject stays in sight wherever it begins, and that are seen of every solid.
IN_PLACE = ("jumps", "circles", "rises", "falls")
# What an edit changes: the values to choose from, and the clip with another one.
CHANGES: dict[str, tuple[Sequence[str], Callable[[Clip, str], Clip]]] = {
    "colour": (tuple(COLOURS), lambda clip, value: _with_subject(clip, colour=value)),
    "shape": (SHAPES, lambda clip, value: _with_subject(clip, shape=value)),
    "scene": (SCENES, lambda clip, value: replace(clip, scene=value)),
    "action": (IN_PLACE, lambda clip, value: _with_subject(clip, actions=((0.0, value),))),
}


def _changed(clip: Clip, attribute: str, rng: random.Random) -> Pair:
    values, change = CHANGES[attribute]
    value = rng.choice([value for value in values if value != truth(clip)[attribute]])
    return Pair(attribute=attribute, source=clip, target=change(clip, value))


def _with_subject(clip: Clip, **changes: Any) -> Clip:
    return replace(clip, subjects=(replace(clip.subjects[0], **changes),))


def trials(asked: Evaluation) -> list[Trial]:
    """Return a trial for each pair, with the edits by their ways; the clips are written, without loss.

    Raises `UsageError` for a way that is none and a model that cannot edit.
    """
    for name in asked.only:
        if name not in WAYS:
            raise UsageError(
                f'There is no way to edit "{name}".{did_you_mean(name, WAYS)}', tip=f"use {', '.join(WAYS)}."
            )
    found = []
    for index, pair in enumerate(pairs(asked.num_prompts)):
        text = pair.prompts[1]
        made = {}
        for way in (REAL, *(asked.only or WAYS)):
            fields = {name: value for name, value in WAYS.get(way, {}).items() if name in asked.fields}
            made[way] = Job(
                plan=_planned(asked, text, asked.seed + index, asked.fields | fields | asked.given),
                output=asked.folder / way / f"{index:03d}.mp4",
            )
        real = made.pop(REAL)
        clip = asked.folder.absolute() / GIVEN / f"{index:03d}.png"
        _write(clip, rendered(Prompt(text=text, clip=pair.source), real.plan), real.plan)
        found.append(
            Trial(
                prompt=Prompt(text=text, clip=pair.target),
                made={
                    way: replace(job, make=functools.partial(edited, way, pair, clip), measure=measures)
                    for way, job in made.items()
                },
                real=replace(real, source=functools.partial(rendered, Prompt(text=text, clip=pair.source), real.plan)),
            )
        )
    return found


def edited(
    way: str, pair: Pair, clip: Path, plan: Plan, backbone: Backbone, watch: Watch, latents: Path | None
) -> Generation:
    """Return the edit of a clip in a way; what was measured of it is in its `facts`."""
    from vgen.pipelines import edit
    from vgen.pipelines.text_to_video import Generation

    source, target = pair.prompts
    fields = {
        name: value for name, value in WAYS[way].items() if name not in ("num_inference_steps", "guidance_scale")
    }
    asked = edit_plan(
        EditRequest(
            video=clip,
            source=source,
            target=target,
            model=plan.model,
            seed=plan.seed,
            num_inference_steps=plan.num_inference_steps,
            guidance_scale=plan.guidance_scale,
            guidance_interval=plan.guidance_interval,
            width=plan.width,
            height=plan.height,
            num_frames=plan.num_frames,
            fps=plan.fps,
            device=plan.device,
            dtype=plan.dtype,
            **fields,
        )
    )
    check = int(clip.stem) < CHECKED
    made = edit.edit(asked, backbone, watch=watch, beside=clip.parent, latents=latents, check=check)
    return Generation(
        frames=made.frames,
        latents=made.latents,
        windows=[],
        timings=made.timings,
        facts=_costs(asked.request.mask == "auto", made.measures, made.timings),
    )


def measures(generation: Generation, backbone: Backbone) -> dict[str, float]:
    """Return what `edited` found out, for the manifest."""
    return generation.facts


def _costs(is_masked: bool, found: dict[str, Any], timings: dict[str, float]) -> dict[str, float]:
    """Return evaluations and seconds of the edit itself: without the round trip, which is measured, and the VAE."""
    parts = {"inversion": "invert", "edit": "denoise", **({"mask": "mask"} if is_masked else {})}
    costs = {
        "evaluations": float(sum(found["evaluations"].get(name, 0) for name in parts)),
        "seconds": sum(timings.get(stage, 0.0) for stage in parts.values()),
    }
    trip = {"round_trip_db": found["reconstruction_psnr"]} if "reconstruction_psnr" in found else {}
    return costs | trip


def read(found: Sequence[Trial]) -> Findings:
    """Return the scores of each way, under `edits`: of the pairs as one, and `by` the attribute that was changed.

    `edited` is the share in which the probes read the new value, `others` that in which they read all other
    attributes as they were, `success` that in which they do both. `kept_db` is the PSNR to the clip of what was to
    stay: all but the subject, or with another scene the subject. `track` is the share in which the subject is where it
    is in the true edited clip, `trip_db` the round trip's PSNR. `ceiling` has the same of the true edited clips, and
    `unedited` of the clips after the VAE.
    """
    from vgen import video

    couples = pairs(len(found))
    plan = found[0].real.plan  # but for the seed and the words that of all
    sources = [rendered(Prompt(text="", clip=pair.source), plan) for pair in couples]
    true = [rendered(trial.prompt, plan) for trial in found]
    regions = [_kept(pair, plan) for pair in couples]
    ways: dict[str, list[Frames]] = {
        way: [video.read(trial.made[way].output).frames for trial in found] for way in found[0].made
    }
    unedited = [video.read(trial.real.output).frames for trial in found]
    everything = {**ways, "ceiling": true, "unedited": unedited}
    flat = read_all([frames for videos in everything.values() for frames in videos], plan.fps)
    rows: dict[str, list[dict[str, Any]]] = {}
    scores: dict[str, dict[str, Any]] = {}
    read_as: dict[str, list[Readings]] = {}
    for number, (way, videos) in enumerate(everything.items()):
        read_as[way] = flat[number * len(found) : (number + 1) * len(found)]
        rows[way] = [
            _judged(pair, trial, reading, frames, source, kept)
            for pair, trial, reading, frames, source, kept in zip(
                couples, found, read_as[way], videos, sources, regions, strict=True
            )
        ]
        for row, trial in zip(rows[way], found, strict=True) if way in ways else ():
            row |= manifest.read(trial.made[way].output)["measured"]
        scores[way] = {
            **_summed(rows[way]),
            "flicker": mean_flicker(videos),
            "by": {
                attribute: _summed([row for row in rows[way] if row["attribute"] == attribute])
                for attribute in dict.fromkeys(pair.attribute for pair in couples)
            },
        }
    return Findings(
        scores={
            "edits": {way: scores[way] for way in ways},
            "ceiling": scores["ceiling"],
            "unedited": scores["unedited"],
        },
        details={"videos": [{"way": way, **row} for way in ways for row in rows[way]]},
        rows=[[source, *(ways[way][index] for way in ways)] for index, source in enumerate(sources)],
        labels=[
            f"{pair.prompts[1]}   "
            + "   ".join(f"[{way}: {wrong(read_as[way][index], truth(pair.target))}]" for way in ways)
            for index, pair in enumerate(couples)
        ],
    )


def table(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a report."""
    return [*report["edits"].items(), ("ceiling", report["ceiling"]), ("unedited", report["unedited"])]


def _judged(
    pair: Pair, trial: Trial, reading: Readings, frames: Frames, source: Frames, kept: Tensor
) -> dict[str, Any]:
    """Return what there is to say of one edit."""
    import torch

    from vgen.metrics import fidelity

    told = truth(pair.target)
    return {
        "attribute": pair.attribute,
        "prompt": trial.prompt.text,
        "reading": reading.to_dict(),
        "edited": reading[pair.attribute] == told[pair.attribute],
        "others": all(reading[name] == told[name] for name in ATTRIBUTES if name != pair.attribute),
        "success": all(reading[name] == told[name] for name in ATTRIBUTES),
        "kept_db": round(fidelity.psnr(torch.tensor(frames), torch.tensor(source), kept), 2),
        "track": _on_track(pair, trial.real.plan, frames),
    }


def _summed(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the shares and means of what was judged of several."""
    shares = ("edited", "others", "success", "track")
    summed: dict[str, Any] = {name: share(row[name] for row in rows) for name in shares}
    means = {"kept_db": "kept_db", "trip_db": "round_trip_db", "evals": "evaluations", "seconds": "seconds"}
    for name, field in means.items():
        values = [row[field] for row in rows if field in row]
        if values:
            summed[name] = round(sum(values) / len(values), 2)
    return summed


def _kept(pair: Pair, plan: Plan) -> Tensor:
    """Return how much of each pixel [F, H, W] is to stay as it is."""
    import torch
    from torch import nn

    masks = [mask for clip in (pair.source, pair.target) for mask in _render(clip, plan).masks[0].float() / 255]
    if pair.attribute == "scene":
        whole: Tensor = (masks[0] == 1).float()
        return whole
    subjects = torch.stack(masks).amax(0)
    near: Tensor = nn.functional.max_pool2d(subjects[:, None], 2 * MARGIN + 1, stride=1, padding=MARGIN)[:, 0]
    return 1 - near


def _on_track(pair: Pair, plan: Plan, frames: Frames) -> bool:
    """Return whether the subject is, on average, near where it is in the true edited clip."""
    from vgen.toyland import readings

    centres = readings.centroids(frames, pair.target.subjects[0].colour)
    distances = (centres - _render(pair.target, plan).pixel_tracks[0, 0]).norm(dim=1)
    seen = distances.isfinite()
    return bool(seen.float().mean() >= FOUND and distances[seen].mean() <= NEAR * plan.height)


def _render(clip: Clip, plan: Plan) -> Any:
    from vgen.toyland.renderer import render

    return render([clip], num_frames=plan.num_frames, height=plan.height, width=plan.width, fps=plan.fps)


def _planned(asked: Evaluation, text: str, seed: int, fields: dict[str, Any]) -> Plan:
    request = GenerateRequest(prompt=text, model=asked.model, seed=seed, **fields)
    return batch.plan_lines([PromptLine(number=None, request=request)], [])[0][0].plan


def _write(clip: Path, frames: Frames, plan: Plan) -> None:
    from vgen import video

    outputs.prepare_folder(clip)
    video.save(frames, clip, fps=plan.fps)


TASK = Task(
    trials=trials,
    read=read,
    table=table,
    columns=("edited", "others", "success", "kept_db", "track", "trip_db", "evals", "seconds", "flicker"),
    parts=tuple(WAYS),
)
