"""From plans to files: load a model once, make each video, write it with its manifest, and account for the time."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import files, hub, loras, manifest, outputs, runtime
from vgen.batch import Failure, PlannedLine
from vgen.errors import VgenError
from vgen.request import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.backbones import Backbone
    from vgen.context_parallel import ContextParallel
    from vgen.pipelines.text_to_video import Generation
    from vgen.video import Frames

STAGES = ("load", "encode", "denoise", "decode", "write")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One video to make and where to; `line` is the line of the prompt file that asks for it.

    With `source`, which returns frames uint8 [F, H, W, 3], nothing is generated: the video is what the model's VAE
    leaves of those frames. What `measure` returns of the video goes into its manifest.
    """

    plan: Plan
    output: Path
    line: int | None = None
    source: Callable[[], Frames] | None = None
    measure: Callable[[Generation, Backbone], dict[str, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is told while a run goes on: a job begins, a stage of it begins, step i of n is done, something is odd.

    `on_note` is told what is good to know, such as how a LoRA fits; `download` of files that arrive where the model is
    not on this machine.
    """

    on_job: Callable[[Job], None] = lambda job: None
    on_stage: Callable[[str], None] = lambda stage: None
    on_step: Callable[[int, int], None] = lambda step, num_steps: None
    on_warning: Callable[[str], None] = lambda message: None
    on_note: Callable[[str], None] = lambda message: None
    download: hub.Progress = hub.SILENT


@dataclass(kw_only=True)
class Report:
    """What a run made and what it cost: seconds per stage and in all, and the most memory held, in MiB."""

    made: list[Job] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    latents: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=lambda: {**dict.fromkeys(STAGES, 0.0), "total": 0.0})
    peak_memory_mb: float = 0.0
    peak_vram_mb: float = 0.0


def jobs(lines: Sequence[PlannedLine], output: Path | None) -> list[Job]:
    """Return a job for every planned line, with the names that `output` stands for."""
    paths = outputs.choose(output, lines, datetime.now())
    return [Job(plan=line.plan, output=path, line=line.number) for line, path in zip(lines, paths, strict=True)]


def generate(
    jobs: Sequence[Job], *, watch: Watch, keep_latents: bool = False, keep_going: bool = False, writes: bool = True
) -> Report:
    """Make every job's video and return the account of it.

    Latents are written before they are decoded and removed once the video is written, unless `keep_latents`. With
    `keep_going` a job that fails is reported and the others still run; without it the error is raised. Of several
    processes that share the work, one `writes`.
    """
    run = _Run(watch, writes=writes)
    for job in jobs:
        watch.on_job(job)
        try:
            run.generate(job, keep_latents=keep_latents)
        except VgenError as error:
            if not keep_going:
                raise
            run.report.failures.append(Failure(prompt=job.plan.prompt, line=job.line, error=error))
    return run.account()


def decode(latents: Path, job: Job, *, watch: Watch) -> Report:
    """Finish the job of a latents file: decode it, write the video, and return the account. The latents stay."""
    run = _Run(watch)
    watch.on_job(job)
    run.decode(latents, job)
    return run.account()


class _Run:
    """A run in progress: its model, kept for as long as the jobs ask for the same one, and the account so far."""

    def __init__(self, watch: Watch, *, writes: bool = True) -> None:
        self.watch = watch
        self.writes = writes
        self.report = Report()
        self.start = time.perf_counter()
        self.model: tuple[Any, ...] | None = None
        self.shared: ContextParallel | None = None

    def generate(self, job: Job, *, keep_latents: bool) -> None:
        backbone = self.load(job.plan)
        from vgen.pipelines import text_to_video

        latents = outputs.latents_path(job.output)
        if self.writes:
            latents.unlink(missing_ok=True)

        def save(tensor: Tensor) -> None:
            text_to_video.save_latents(latents, tensor, job.plan)

        if self.shared is not None:
            self.shared.fit(job.plan.num_frames, job.plan.height, job.plan.width)
        with _errors_for_people(latents):
            if job.source is not None:
                self.write(job, text_to_video.rebuild(job.plan, job.source(), backbone, on_stage=self.watch.on_stage))
                return
            generation = text_to_video.generate(
                job.plan,
                backbone,
                on_stage=self.watch.on_stage,
                on_step=self.watch.on_step,
                on_warning=self.warn,
                save_latents=save if self.writes else None,
            )
            if not self.writes:
                return
            self.write(job, generation)
        if keep_latents:
            self.report.latents.append(latents)
        else:
            latents.unlink()

    def decode(self, latents: Path, job: Job) -> None:
        backbone = self.load(job.plan, decode_only=True)
        from vgen.pipelines import text_to_video

        with _errors_for_people(latents):
            self.write(job, text_to_video.decode_latents(latents, backbone, on_stage=self.watch.on_stage))

    def load(self, plan: Plan, *, decode_only: bool = False) -> Backbone:
        model = (plan.model, plan.lora, plan.device, plan.dtype, plan.context_parallel)
        if model != self.model:
            self.watch.on_stage("load")
            start = time.perf_counter()
            from vgen import backbones

            chosen = runtime.choose(plan.device, plan.dtype)
            self.backbone = backbones.load(
                plan.checkpoint, chosen, decode_only=decode_only, progress=self.watch.download
            )
            if plan.context_parallel is not None and not decode_only:
                from vgen import context_parallel

                self.shared = context_parallel.attach(self.backbone, plan.context_parallel)
            self.identity = manifest.identity(self.backbone.checkpoint)
            self.model = model
            for lora in () if decode_only else self.backbone.checkpoint.loras:
                (self.warn if lora.unmatched else self.watch.on_note)(lora.report())
            self.report.timings["load"] += time.perf_counter() - start
        return self.backbone

    def warn(self, message: str) -> None:
        """Tell of something odd before the time is spent on it, once for all jobs."""
        if message not in self.report.warnings:
            self.report.warnings.append(message)
            self.watch.on_warning(message)

    def write(self, job: Job, generation: Generation) -> None:
        self.watch.on_stage("write")
        start = time.perf_counter()
        from vgen import video

        loaded = self.backbone.checkpoint
        # Before a download the plan did not know the commit that its model's name stands for.
        known = replace(job.plan, model=loaded.anchored_name) if loaded.source == "hub" else job.plan
        found = {lora.text: lora for lora in loaded.loras}
        known = replace(known, lora=tuple(loras.anchored(text, found.get(text)) for text in known.lora or ()) or None)
        made = manifest.build(
            known,
            self.backbone.runtime,
            checkpoint=self.identity,
            timings={"load": self.report.timings["load"], **generation.timings},
            created=datetime.now().astimezone(),
        )
        if job.source is not None:
            made["rebuilt"] = True
        if job.measure is not None:
            made["measured"] = job.measure(generation, self.backbone)
        if generation.sound is not None and job.output.suffix.lower() not in video.SOUND_ENCODERS:
            formats = " or ".join(video.SOUND_ENCODERS)
            self.warn(f"{job.output.suffix} has no place for the sound that the model made.\nTip: write {formats}.")
        video.save(generation.frames, job.output, fps=job.plan.fps, manifest=made, sound=generation.sound)
        files.write_text(manifest.sidecar(job.output), json.dumps(made, indent=2) + "\n")
        self.report.made.append(job)
        for stage, seconds in (*generation.timings.items(), ("write", time.perf_counter() - start)):
            self.report.timings[stage] += seconds

    def account(self) -> Report:
        self.report.timings["total"] = time.perf_counter() - self.start
        self.report.peak_memory_mb = runtime.peak_ram_mb()
        if self.model is not None:
            self.report.peak_vram_mb = runtime.peak_vram_mb(self.backbone.runtime)
        return self.report


@contextmanager
def _errors_for_people(latents: Path) -> Iterator[None]:
    """Say where the latents are when something stops a run after they were written, and say so when memory ran out."""
    kept = f"The latents are kept in {latents}."
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(kept if latents.exists() else "") from interrupt
    except (VgenError, RuntimeError, MemoryError) as error:
        tips = [error.tip] if isinstance(error, VgenError) and error.tip else []
        message = error.message if isinstance(error, VgenError) else str(error)
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", message):
            message, tips = "The memory ran out.", ["try fewer --frames, or a smaller --width and --height."]
        elif isinstance(error, RuntimeError) and not latents.exists():
            raise
        if latents.exists():
            message, tips = f"{message}\n{kept}", [*tips, f"the video can still be made with: vgen decode {latents}"]
        raise VgenError(message, tip=" ".join(tips) or None) from error
