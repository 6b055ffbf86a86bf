"""What is asked of an evaluation, and the trials it becomes: held-out prompts and the videos to make of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import batch, checkpoints, manifest
from vgen.batch import PromptLine
from vgen.errors import UsageError, VgenError
from vgen.pipelines.run import Job
from vgen.plan import Plan
from vgen.request import GenerateRequest
from vgen.toyland.prompts import Prompt, held_out

if TYPE_CHECKING:
    from vgen.video import Frames

# What a trial takes from the embedded checkpoint's defaults, whatever the model: all are scored alike.
SETTINGS = ("width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale")
ANYWHERE = ("device", "dtype", "model")  # fields in which a video that is there may differ
REAL = "real"

# Fields of a request, by the name of a video to make with them.
Variants = Mapping[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is asked for: a task, of a model, with so many held-out prompts; prompt i has seed `seed` + i.

    `given` are fields of a request that take the place of Toyland's defaults. `only` are parts of the task, or all
    of it where it is empty.
    """

    task: str
    folder: Path
    num_prompts: int
    seed: int
    model: str
    given: dict[str, Any]
    only: tuple[str, ...] = ()

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a request that all of the videos share."""
        usual = asdict(checkpoints.resolve("toyland").defaults)
        return {name: usual[name] for name in SETTINGS} | self.given

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts; raises `UsageError` for more than there are, or fewer than two, which cannot be shuffled."""
        prompts = held_out()
        if not 2 <= self.num_prompts <= len(prompts):
            raise UsageError(
                f"{self.num_prompts} prompts are not possible.", tip=f"choose --prompts from 2 to {len(prompts)}."
            )
        return prompts[: self.num_prompts]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A held-out prompt, the videos that the model makes of it by their names, and the real one after its VAE."""

    prompt: Prompt
    made: dict[str, Job]
    real: Job

    @property
    def jobs(self) -> list[Job]:
        """All videos of the trial."""
        return [*self.made.values(), self.real]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a task reads out of the videos: scores, details of each, and the rows of a sheet with their labels."""

    scores: dict[str, Any]
    details: dict[str, Any]
    rows: list[list[Frames]]
    labels: list[str]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something that a model can do and that can be scored.

    `trials` plans the videos, `read` reads them once they are made, and `table` has the rows to print of a report,
    each a name and values by their names, of which `columns` are printed. `parts` are what `Evaluation.only` may name.
    """

    trials: Callable[[Evaluation], list[Trial]]
    read: Callable[[Sequence[Trial]], Findings]
    table: Callable[[dict[str, Any]], list[tuple[str, dict[str, Any]]]]
    columns: tuple[str, ...]
    parts: tuple[str, ...] = ()


def planned(asked: Evaluation, variants: Callable[[int, Prompt], Variants]) -> list[Trial]:
    """Return a trial for each prompt, with the videos that `variants` of its number and prompt tells.

    A video lies in `asked.folder`, in the folder of its variant's name. Raises `UsageError` for what the model cannot.
    """
    prompts = asked.prompts
    wanted = [{REAL: {}, **variants(index, prompt)} for index, prompt in enumerate(prompts)]
    lines = [
        PromptLine(
            number=None,
            request=GenerateRequest(
                prompt=prompt.text, model=asked.model, seed=asked.seed + index, **asked.fields, **fields
            ),
        )
        for index, prompt in enumerate(prompts)
        for fields in wanted[index].values()
    ]
    plans = iter([line.plan for line in batch.plan_lines(lines, [])[0]])
    trials = []
    for index, prompt in enumerate(prompts):
        jobs = {name: Job(plan=next(plans), output=asked.folder / name / f"{index:03d}.mp4") for name in wanted[index]}
        plan = jobs[REAL].plan
        real = Job(plan=plan, output=jobs.pop(REAL).output, source=functools.partial(rendered, prompt, plan))
        trials.append(Trial(prompt=prompt, made=jobs, real=real))
    return trials


def rendered(prompt: Prompt, plan: Plan) -> Frames:
    """Return the true clip of a prompt at a plan's size, length and frame rate."""
    from vgen.toyland.renderer import render

    clips = [prompt.clip]
    return (
        render(clips, num_frames=plan.num_frames, height=plan.height, width=plan.width, fps=plan.fps).frames[0].numpy()
    )


def missing(found: Sequence[Trial]) -> list[Job]:
    """Return the jobs whose video is not there yet; raise `VgenError` where another model or setting made it."""
    lacking = []
    identity = manifest.identity(found[0].real.plan.checkpoint)
    for job in [job for trial in found for job in trial.jobs]:
        if not job.output.exists():
            lacking.append(job)
            continue
        made = manifest.read(job.output)
        was = manifest.request(made, {}).to_dict()
        asked = {key: value for key, value in job.plan.to_dict().items() if key not in ANYWHERE}
        if made["checkpoint"] != identity or any(was[key] != value for key, value in asked.items()):
            raise VgenError(
                f"{job.output} was made by another model, or with other settings.", tip="choose another --output."
            )
    return lacking
