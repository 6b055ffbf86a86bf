"""From a clip to its edit: encode, invert, denoise towards the target, decode, put back; and how well that went."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import manifest
from vgen.editing import inversions
from vgen.editing import latents as kept
from vgen.editing.plan import EditPlan
from vgen.editing.plan import plan as planned
from vgen.editing.request import EditRequest
from vgen.errors import VgenError
from vgen.integrity import clip_sha256
from vgen.pipelines import run
from vgen.pipelines.edit_work import Edited, Work, hashes
from vgen.pipelines.run import Job, Report, Watch
from vgen.pipelines.text_to_video import Generation
from vgen.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.backbones import Backbone

SIDE_BY_SIDE = ".compare.mp4"


def job(plan: EditPlan, output: Path, *, compare: bool = False) -> Job:
    """Return the job of making an edit, which `run.generate` and `ranks.generate` do.

    With `compare` the clip and its edit are beside each other in a second video.
    """
    return Job(
        plan=plan.shown,
        output=output,
        make=functools.partial(_made, plan, output.parent),
        beside=functools.partial(_side_by_side, plan, output) if compare else None,
    )


def decoding(latents: Path, output: Path, changes: Mapping[str, Any]) -> Job:
    """Return the job of finishing an edit from its latents, which `run.decode` does; `changes` are of its request.

    Raises `VgenError` where the clip or the mask is another than it was.
    """
    facts = kept.read(latents)[0]
    request = EditRequest.from_dict({**facts["request"], **changes})
    # The noise has done its part, and an edit that was begun on several GPUs is decoded on one.
    plan = planned(replace(request, noise=None, gpus=None, context_parallel=None))
    plan = replace(plan, request=replace(plan.request, noise=request.noise))
    for name in ("video", "mask"):
        if facts["hashes"].get(f"{name}_sha256") != hashes(plan).get(f"{name}_sha256"):
            raise VgenError(f"The {name} has changed since {latents} was made of it.", tip="edit the clip again.")
    return Job(plan=plan.shown, output=output, make=functools.partial(_decoded, plan, latents))


def run_inversion(plan: EditPlan, output: Path, *, watch: Watch) -> Report:
    """Invert the clip of a plan, write its noise to `output`, and return the account of it."""

    def do(backbone: Backbone, watch: Watch) -> tuple[dict[str, Any], dict[str, float], dict[str, Any] | None]:
        return invert(plan, backbone, output, watch=watch)

    (measures, timings, attention), report = run.work(plan.shown, do, watch=watch)
    report.measures.append(measures)
    report.attention += [attention] if attention is not None else []
    report.timings = {"load": report.timings["load"], **timings, "total": report.timings["total"]}
    report.beside.append(output)
    return report


def edit(
    plan: EditPlan,
    backbone: Backbone,
    *,
    watch: Watch,
    beside: Path,
    latents: Path | None = None,
    check: bool = True,
) -> Edited:
    """Return the edit that a plan describes, made by a loaded backbone, with the measures of it.

    What is finished of the latents is in the file `latents` before it is decoded. Features that are kept on disk are
    in a folder `beside` the output. Without `check` the inversion's round trip is not measured. Raises `VgenError` for
    a result that is not finite.
    """
    import torch

    work = Work(plan, backbone, watch, beside)
    with torch.inference_mode(), work.attending():
        made = []
        work.encode_prompts()
        for number, window in enumerate(plan.windows):
            work.edit(number, window, check=check)
            if latents is not None:
                work.save(latents)
            made.append(work.decode(work.latents[-1]))
        return work.finished(made)


def decode(plan: EditPlan, backbone: Backbone, path: Path, *, watch: Watch) -> Edited:
    """Return the edit that a plan describes, out of the latents that a run has left of it.

    Of a clip in parts, those that were not edited any more are as they are in the clip, which is warned of.
    """
    import torch

    facts, latents, masks = kept.read(path)
    work = Work(plan, backbone, watch, path.parent, sigmas=False)
    work.latents, work.masks = ([one[None] for one in several] for several in (latents, masks))
    work.measures = facts["measures"]
    with torch.inference_mode():
        made = [work.decode(one) for one in work.latents]
        for window in plan.windows[len(made) :]:
            made.append(torch.tensor(plan.fit.frames(plan.clip.frames[window.of(plan.taken)])))
            work.masks.append(torch.zeros_like(work.masks[0]))
        if len(made) > len(latents):
            watch.on_warning(
                f"{len(latents)} of the clip's {len(made)} parts had been edited: the rest is as it is in the clip."
            )
        return work.finished(made)


def invert(
    plan: EditPlan, backbone: Backbone, output: Path, *, watch: Watch
) -> tuple[dict[str, Any], dict[str, float], dict[str, Any] | None]:
    """Write the noise [N, C, T, h, w] of a clip's N windows to `output`, with the V of `--inject` steps.

    Returns what was measured, the seconds per stage, and what sparse attention did.
    """
    import torch

    work = Work(plan, backbone, watch, output.parent)
    noises: list[Tensor] = []
    features: list[dict[str, Tensor]] = []
    with torch.inference_mode(), work.attending():
        work.encode_prompts()
        for window in plan.windows:
            with work.stages("encode"):
                data = work.encode(window)
            sharing = work.sharing()
            noise = work.invert(data, sharing)
            work.round_trip(data, noise)
            noises.append(noise.cpu())
            stored = {name: sharing.store.get(name) for name in sharing.store.names()}
            features.append({name: value for name, value in stored.items() if value is not None})
            sharing.store.close()
        facts = {
            "request": plan.to_dict() | {"dtype": backbone.runtime.dtype},
            "video_sha256": clip_sha256(plan.request.video),
            "checkpoint": manifest.identity(backbone.checkpoint),
            "sigmas": work.sigmas.tolist(),
            "measures": work.measures,
        }
        with work.stages("write"):
            inversions.save(output, facts, noises, features)
    return work.measures, work.stages.timings, work.attention()


def _made(
    asked_for: EditPlan, beside: Path, shown: Plan, backbone: Backbone, watch: Watch, latents: Path | None
) -> Generation:
    """Make a job's edit; `shown` is the plan of a window as the run has settled it."""
    plan = replace(asked_for, shown=shown)
    return _generation(plan, edit(plan, backbone, watch=watch, beside=beside, latents=latents), watch)


def _decoded(
    asked_for: EditPlan, path: Path, shown: Plan, backbone: Backbone, watch: Watch, latents: Path | None
) -> Generation:
    """Make the edit of a job that another run has left the latents of."""
    plan = replace(asked_for, shown=shown)
    return _generation(plan, decode(plan, backbone, path, watch=watch), watch)


def _generation(plan: EditPlan, edited: Edited, watch: Watch) -> Generation:
    """Return what a run writes of an edit, with the clip's rate and sound."""
    from vgen.editing import footage

    clip, sound = plan.clip, None
    fps = clip.fps or plan.shown.fps
    if clip.sound_format:
        try:
            sound = footage.sound(clip, len(edited.frames) / fps)
        except VgenError as error:
            watch.on_warning(f"{error.message} The result is silent.")
    return Generation(
        frames=edited.frames,
        latents=edited.latents,
        windows=[],
        timings=edited.timings,
        sound=sound,
        attention=edited.attention,
        fps=fps,
        told={
            "task": "edit",
            "request": plan.to_dict(),
            **hashes(plan),
            "sampler": None,
            "method": {"name": plan.request.method, **asdict(plan.method)},
        },
        measures=edited.measures,
    )


def _side_by_side(plan: EditPlan, output: Path, made: Generation) -> Path:
    """Write the clip and its edit beside each other, and return where."""
    import numpy as np

    from vgen import video

    path = output.with_name(f"{output.name}{SIDE_BY_SIDE}")
    video.save(
        np.concatenate([plan.clip.frames, made.frames], 2), path, fps=made.fps or plan.shown.fps, sound=made.sound
    )
    return path
