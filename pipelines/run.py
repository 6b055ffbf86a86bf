"""From plans to files: load a model once, make each video, write it with its manifest, and account for the time."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vgen import attention, checkpoints, files, hub, loras, manifest, offloading, outputs, quantization, runtime
from vgen import latents as kept
from vgen.batch import Failure, PlannedLine
from vgen.errors import VgenError, is_out_of_memory
from vgen.performance import Settings
from vgen.plan import Plan, settle

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.backbones import Backbone
    from vgen.context_parallel import ContextParallel
    from vgen.pipelines.text_to_video import Generation
    from vgen.video import Frames

T = TypeVar("T")

STAGES = ("load", "encode", "denoise", "decode", "write")
DOING = {
    "load": "while the model was loaded",
    "encode": "while the prompt was encoded",
    "mask": "while the region of the edit was found",
    "invert": "while inverting",
    "check": "while the inversion was measured",
    "denoise": "while denoising",
    "decode": "while decoding",
    "measure": "while the edit was measured",
    "write": "while the video was written",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One video to make and where to; `line` is the line of the prompt file that asks for it.

    With `source`, which returns frames uint8 [F, H, W, 3], nothing is generated: the video is what the model's VAE
    leaves of those frames. With `make`, the loaded model makes it in another way than from the prompt: it is given a
    path to save latents to before they are decoded, or None. What `measure` returns of the video goes into its
    manifest, and `beside` writes another file beside it.
    """

    plan: Plan
    output: Path
    line: int | None = None
    source: Callable[[], Frames] | None = None
    make: Callable[[Plan, Backbone, Watch, Path | None], Generation] | None = None
    measure: Callable[[Generation, Backbone], dict[str, float]] | None = None
    beside: Callable[[Generation], Path] | None = None


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
    """What a run made and what it cost: seconds per stage and in all, and the most memory held, in MiB.

    `attention` is what sparse attention did for each video that asked for it, `measures` what the maker of each video
    has measured, and `beside` are the files beside them.
    """

    made: list[Job] = field(default_factory=list)
    beside: list[Path] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    latents: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    attention: list[dict[str, Any]] = field(default_factory=list)
    measures: list[dict[str, Any]] = field(default_factory=list)
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


def work(plan: Plan, do: Callable[[Backbone, Watch], T], *, watch: Watch) -> tuple[T, Report]:
    """Return what something else than a video comes to with the backbone of a plan, and the account of it."""
    run = _Run(watch)
    with run.errors_for_people(plan, None):
        done = do(run.load(plan), run.watching())
    return done, run.account()


def load(plan: Plan, *, watch: Watch) -> Backbone:
    """Return the backbone of a plan, fitted to this machine as `generate` fits it."""
    return _Run(watch).load(plan)


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
        self.stage = ""
        self.backbone: Backbone | None = None
        self.loaded: tuple[Any, ...] | None = None
        self.shared: ContextParallel | None = None

    def generate(self, job: Job, *, keep_latents: bool) -> None:
        latents = outputs.latents_path(job.output)
        if self.writes:
            latents.unlink(missing_ok=True)

        def save(tensor: Tensor) -> None:
            kept.save(latents, tensor, job.plan)

        with self.errors_for_people(job.plan, latents):
            backbone = self.load(job.plan)
            from vgen.pipelines import text_to_video

            if self.shared is not None:
                self.shared.fit(job.plan.num_frames, job.plan.height, job.plan.width)
            if job.source is not None:
                self.write(job, text_to_video.rebuild(job.plan, job.source(), backbone, on_stage=self.on_stage))
                return
            if job.make is not None:
                generation = job.make(job.plan, backbone, self.watching(), latents if self.writes else None)
            else:
                generation = text_to_video.generate(
                    job.plan,
                    backbone,
                    on_stage=self.on_stage,
                    on_step=self.watch.on_step,
                    on_warning=self.warn,
                    save_latents=save if self.writes else None,
                )
            if not self.writes:
                return
            self.write(job, generation)
        if not keep_latents:
            latents.unlink(missing_ok=True)
        elif latents.exists():
            self.report.latents.append(latents)

    def decode(self, latents: Path, job: Job) -> None:
        with self.errors_for_people(job.plan, latents):
            backbone = self.load(job.plan, decode_only=True)
            from vgen.pipelines import text_to_video

            if job.make is not None:
                self.write(job, job.make(job.plan, backbone, self.watching(), None))
                return
            self.write(job, text_to_video.decode_latents(latents, backbone, on_stage=self.on_stage))

    def load(self, plan: Plan, *, decode_only: bool = False) -> Backbone:
        asked = (plan.model, plan.lora, plan.device, plan.settings, plan.context_parallel)
        if self.backbone is None or asked != self.loaded:
            self.on_stage("load")
            start = time.perf_counter()
            from vgen import backbones

            # The memory of the last model is for this one.
            self.backbone = self.loaded = None
            self.settings = self.settle(plan)
            assert self.settings.offload is not None, "the weights are here"
            chosen = replace(
                runtime.choose(plan.device, self.settings.dtype),
                offload="none" if decode_only else self.settings.offload,
                tiling=self.settings.tiling,
                compile=self.settings.compile and not decode_only,
            )
            if plan.attention is not None and not decode_only:
                pattern = attention.parse(plan.attention)
                attention.kernels.choose(pattern.kernel, chosen.device, pattern.block)
            self.backbone = backbones.load(
                plan.checkpoint, chosen, decode_only=decode_only, progress=self.watch.download
            )
            if plan.context_parallel is not None and not decode_only:
                from vgen import context_parallel

                self.shared = context_parallel.attach(self.backbone, plan.context_parallel)
            self.identity = manifest.identity(self.backbone.checkpoint)
            self.loaded = asked
            for lora in () if decode_only else self.backbone.checkpoint.loras:
                (self.warn if lora.unmatched else self.watch.on_note)(lora.report())
            self.report.timings["load"] += time.perf_counter() - start
        return self.backbone

    def settle(self, plan: Plan) -> Settings:
        """Return the plan's settings; what it left open, as its weights were not here, is chosen by the weights."""
        if plan.settings.offload is not None:
            return plan.settings
        from vgen import backbones

        backbones.require_runnable(plan.checkpoint)
        settings = settle(plan, checkpoints.fetch(plan.checkpoint, self.watch.download))
        for note in settings.notes:
            if note not in plan.notes:
                self.warn(note)
        return settings

    def on_stage(self, stage: str) -> None:
        """Tell that a stage begins, which the models of the last one need not be on the GPU for."""
        self.stage = stage
        if self.backbone is not None and self.backbone.runtime.offload != "none":
            offloading.rest(self.backbone)
        self.watch.on_stage(stage)

    def watching(self) -> Watch:
        """Return what somebody else's work is to tell of its stages and warnings."""
        return replace(self.watch, on_stage=self.on_stage, on_warning=self.warn)

    def warn(self, message: str) -> None:
        """Tell of something odd before the time is spent on it, once for all jobs."""
        if message not in self.report.warnings:
            self.report.warnings.append(message)
            self.watch.on_warning(message)

    def write(self, job: Job, generation: Generation) -> None:
        self.on_stage("write")
        start = time.perf_counter()
        from vgen import video

        assert self.backbone is not None
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
            attention=generation.attention,
        )
        made["performance"] = self.performance(generation)
        if generation.attention is not None:
            self.report.attention.append(generation.attention)
        if job.source is not None:
            made["rebuilt"] = True
        if loaded.quantization:
            how = quantization.arithmetic(loaded.quantization, self.backbone.runtime.device)
            made["quantization"] = {"scheme": loaded.quantization, "arithmetic": how}
        if job.measure is not None:
            made["measured"] = job.measure(generation, self.backbone)
        if generation.told:
            # Names that the run has settled are told as it has settled them.
            settled = {name: made["request"][name] for name in ("model", "lora", "dtype")}
            made |= generation.told
            made["request"] = {**made["request"], **settled}
        if generation.measures is not None:
            made["measures"] = generation.measures
            self.report.measures.append(generation.measures)
        if generation.sound is not None and job.output.suffix.lower() not in video.SOUND_ENCODERS:
            formats = " or ".join(video.SOUND_ENCODERS)
            self.warn(f"{job.output.suffix} has no place for the sound that the model made.\nTip: write {formats}.")
        fps = generation.fps or job.plan.fps
        video.save(generation.frames, job.output, fps=fps, manifest=made, sound=generation.sound)
        files.write_text(manifest.sidecar(job.output), json.dumps(made, indent=2) + "\n")
        if job.beside is not None:
            self.report.beside.append(job.beside(generation))
        self.report.made.append(job)
        for stage, seconds in (*generation.timings.items(), ("write", time.perf_counter() - start)):
            self.report.timings[stage] = self.report.timings.get(stage, 0.0) + seconds

    def performance(self, generation: Generation) -> dict[str, Any]:
        """Return what was chosen for the machine and why, and what a cache has skipped, for the manifest."""
        from vgen.backbones.components import models_of

        assert self.backbone is not None
        chosen = {**self.settings.to_dict(), "offload": self.backbone.runtime.offload}
        # Decoding may have turned to tiles for want of memory.
        chosen["tiling"] = models_of(self.backbone)["vae"].use_tiling
        if (skipped := generation.skipped) is not None:
            chosen["cache"] = {**asdict(skipped), "share": round(skipped.share, 4)}
        return chosen

    def account(self) -> Report:
        self.report.timings["total"] = time.perf_counter() - self.start
        self.report.peak_memory_mb = runtime.peak_ram_mb()
        if self.backbone is not None:
            self.report.peak_vram_mb = runtime.peak_vram_mb(self.backbone.runtime)
        return self.report

    @contextmanager
    def errors_for_people(self, plan: Plan, latents: Path | None) -> Iterator[None]:
        """Say where the latents are when something stops a run after they were written, and how memory ran out."""
        kept = f"The latents are kept in {latents}."

        def is_saved() -> bool:
            return latents is not None and latents.exists()

        try:
            yield
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(kept if is_saved() else "") from interrupt
        except (VgenError, RuntimeError, MemoryError, OSError) as error:
            tips = [error.tip] if isinstance(error, VgenError) and error.tip else []
            message = error.message if isinstance(error, VgenError) else str(error)
            ran_out = is_out_of_memory(error)
            if ran_out:
                message = self.out_of_memory()
                tips = [] if self.stage == "decode" else [_to_save_memory(plan, self.stage)]
                # What the failed stage has computed is not to stay for as long as the error does.
                traceback.clear_frames(error.__traceback__)
            elif not isinstance(error, VgenError) and not is_saved():
                raise
            if is_saved():
                saving = " --performance memory" if ran_out and not plan.settings.tiling else ""
                message = f"{message}\n{kept}"
                tips.append(f"the video can still be made with: vgen decode {latents}{saving}")
            raise VgenError(message, tip=" ".join(tips) or None) from error

    def out_of_memory(self) -> str:
        """Return where memory ran out, and how much there is."""
        device = "cpu" if self.backbone is None else self.backbone.runtime.device
        memory = runtime.memory(device)
        name = "main memory" if device in ("cpu", "mps") else device
        return (
            f"The memory ran out {DOING[self.stage]}: {name} has {memory.total / 1e9:.1f} GB, of which "
            f"{memory.free / 1e9:.1f} GB were free."
        )


def _to_save_memory(plan: Plan, stage: str) -> str:
    """Return what to change so that a run takes less memory, the mildest first."""
    smaller = "fewer --frames, or a smaller --width and --height"
    changes = [] if stage == "load" else [smaller]
    if plan.settings.offload != "none" and plan.settings.offload != "group":
        changes.append("--offload group")
    if plan.performance != "memory":
        changes.append("--performance memory")
    return f"try {', or '.join(changes)}." if changes else "use a smaller model."
