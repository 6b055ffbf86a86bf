"""From a clip to its edit: encode, invert, denoise towards the target, decode, put back; and how well that went."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import files, manifest, runtime
from vgen.backbones import Shot
from vgen.editing import request as asked
from vgen.editing.methods import FlowEdit, Inversion, SDEdit
from vgen.editing.request import EditPlan
from vgen.errors import VgenError
from vgen.pipelines import text_to_video
from vgen.pipelines.run import Watch
from vgen.sampling.flow import Velocity
from vgen.sampling.flowedit import flowedit
from vgen.sampling.guidance import classifier_free
from vgen.sampling.inversion import invert as inverted
from vgen.sampling.inversion import last_steps

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vgen.backbones import Backbone
    from vgen.editing.sharing import Sharing
    from vgen.video import Frames

SIDE_BY_SIDE = ".compare.mp4"
SAFE_SHARE = 0.8  # of the free memory, that a store of features may take


@dataclass(frozen=True, kw_only=True)
class Edited:
    """What was made of a clip: frames uint8 [F, H, W, 3] at its own size and rate.

    `region` float [F, H, W] is where it was to change, and `measures` say how well it went.
    """

    frames: Frames
    region: np.ndarray
    measures: dict[str, Any]
    timings: dict[str, float]


@dataclass(kw_only=True)
class Report:
    """What a run made, what was measured, and what it cost: seconds per stage, the most memory held in MiB."""

    outputs: list[Path] = field(default_factory=list)
    seed: int = 0
    measures: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: float = 0.0
    peak_vram_mb: float = 0.0


def run(plan: EditPlan, output: Path, *, watch: Watch, compare: bool = False) -> Report:
    """Make the edit that a plan describes, write it to `output` with its manifest, and return the account of it.

    With `compare` the clip and its edit are beside each other in a second video.
    """
    with _running(plan, watch) as running:
        edited = edit(plan, running.backbone, watch=running.watch, beside=output.parent)
        running.timings |= edited.timings
        running.write(output, edited, compare=compare)
        running.report.measures = edited.measures
    return running.report


def run_inversion(plan: EditPlan, output: Path, *, watch: Watch) -> Report:
    """Invert the clip of a plan, write its noise to `output`, and return the account of it."""
    with _running(plan, watch) as running:
        measures, timings = invert(plan, running.backbone, output, watch=running.watch)
        running.timings |= timings
        running.report.measures = measures
        running.report.outputs.append(output)
    return running.report


def edit(plan: EditPlan, backbone: Backbone, *, watch: Watch, beside: Path) -> Edited:
    """Return the edit that a plan describes, made by a loaded backbone, with the measures of it.

    Features that are kept on disk are in a folder `beside` the output. Raises `VgenError` for a result that is not
    finite.
    """
    import torch

    from vgen.editing import fitting, masks

    work = _Work(plan, backbone, watch, beside)
    made, regions, borders = [], [], []
    with torch.inference_mode():
        work.encode_prompts()
        for number, window in enumerate(plan.windows):
            part = work.edit(number, window)
            made.append(part.frames.permute(0, 3, 1, 2).float())
            regions.append(part.region[:, None])
            borders.append(part.border[:, None] if part.border is not None else torch.ones_like(part.region)[:, None])
        with work.stages("measure"):
            count = len(plan.taken)
            view = fitting.joined(made, plan.windows, count)
            region = fitting.joined(regions, plan.windows, count)
            border = fitting.joined(borders, plan.windows, count)
            if plan.mask is not None:
                mask = torch.from_numpy(plan.mask)
                own = masks.soft(mask, plan.request.border or 0)
                frames = _put_back(plan, view, lambda frame: own[min(frame, len(own) - 1)])
                whole = (mask > 0.5).float().expand(len(frames), -1, -1).numpy()
            else:
                faded = _maps(plan, border)
                frames = _put_back(plan, view, lambda frame: faded(frame))
                shown = _maps(plan, region)
                whole = torch.stack([shown(frame) for frame in range(len(frames))]).numpy()
            measures = work.measures | measured(plan.clip.frames, frames, whole)
    return Edited(frames=frames, region=whole, measures=measures, timings=work.stages.timings)


def invert(
    plan: EditPlan, backbone: Backbone, output: Path, *, watch: Watch
) -> tuple[dict[str, Any], dict[str, float]]:
    """Write the noise [N, C, T, h, w] of a clip's N windows to `output`, with the V of `--inject` steps.

    Returns what was measured, and the seconds per stage.
    """
    import torch
    from safetensors.torch import save

    work = _Work(plan, backbone, watch, output.parent)
    noises, features = [], {}
    with torch.inference_mode():
        work.encode_prompts()
        for number, window in enumerate(plan.windows):
            with work.stages("encode"):
                data = work.encode(window)
            sharing = work.sharing()
            noise = work.invert(data, sharing)
            work.round_trip(data, noise)
            noises.append(noise.cpu())
            if sharing.schedule.num_features:
                for name in sharing.store.names():
                    value = sharing.store.get(name)
                    assert value is not None
                    features[f"features.{number}.{name}"] = value.contiguous()
            sharing.store.close()
        facts = {
            "request": plan.to_dict() | {"dtype": backbone.runtime.dtype},
            "video_sha256": asked.content(plan.request.video),
            "checkpoint": manifest.identity(backbone.checkpoint),
            "sigmas": work.sigmas.tolist(),
            "measures": work.measures,
        }
        with work.stages("write"):
            metadata = {"vgen": asked.INVERSION, "facts": json.dumps(facts)}
            content = save({"noise": torch.cat(noises), **features}, metadata)
            with files.atomic(output) as part:
                part.write_bytes(content)
    return work.measures, work.stages.timings


def measured(source: np.ndarray, result: np.ndarray, region: np.ndarray) -> dict[str, float | None]:
    """Return how an edit differs from its clip, frames uint8 [F, H, W, 3], inside and outside of `region` [F, H, W].

    `background_psnr` (dB) and `background_ssim` are outside, `change_inside` is the mean difference inside, from 0 to
    1; `flicker` and `source_flicker` are how much brightness jumps back and forth. None is what cannot be measured.
    """
    import torch

    from vgen.metrics import fidelity

    one, other, inside = (torch.from_numpy(array) for array in (source, result, region))
    return _rounded(
        {
            "region": float(inside.mean()),
            "background_psnr": fidelity.psnr(one, other, 1 - inside),
            "background_ssim": fidelity.ssim(one, other, 1 - inside),
            "change_inside": fidelity.change(one, other, inside),
            "flicker": fidelity.flicker(other),
            "source_flicker": fidelity.flicker(one),
        }
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A window that is made: frames uint8 [F, h, w, 3], and [F, h, w] where it was to change and how it fades out."""

    frames: Tensor
    region: Tensor
    border: Tensor | None


class _Work:
    """The edit of one clip: what its windows share, and the account of them."""

    def __init__(self, plan: EditPlan, backbone: Backbone, watch: Watch, beside: Path) -> None:
        self.plan, self.backbone, self.watch, self.beside = plan, backbone, watch, beside
        self.stages = text_to_video.Stages(backbone, watch.on_stage)
        self.measures: dict[str, Any] = {}
        self.shot: Shot = text_to_video.shot_of(plan.shown)
        self.sigmas = last_steps(
            backbone.sigmas(plan.shown.num_inference_steps, self.shot), plan.request.strength or 1.0
        )
        if float(self.sigmas[-1]) != 0:
            raise VgenError(f'The schedule of "{backbone.checkpoint.name}" does not end at 0, as an inversion begins.')
        self._evaluations = 0
        self._round_trips: list[float] = []

    def encode_prompts(self) -> None:
        """Make the velocities of both prompts."""
        with self.stages("encode"):
            shown = self.plan.shown
            for warning in text_to_video.prompt_warnings(shown, self.backbone) if self.plan.request.target else ():
                self.watch.on_warning(warning)
            prompts = [self.plan.request.source or "", self.plan.request.target or ""]
            self._source, self._target = self.backbone.encode_prompt(prompts)
            scales = [shown.cfg_scale, getattr(self.plan.method, "source_guidance_scale", 1.0)]
            self._negative = None
            if max(scales) > 1:
                (self._negative,) = self.backbone.encode_prompt([shown.negative_prompt])

    def source_flow(self, scale: float = 1.0) -> Velocity:
        """Return the velocity of the source prompt, by default without guidance of either kind."""
        return self._flow(self._source, scale, 1.0)

    def target_flow(self, *, guided: bool = True) -> Velocity:
        """Return the velocity of the target prompt."""
        if not guided:
            return self._flow(self._target, 1.0, 1.0)
        scale = text_to_video.guidance_scale_of(self.plan.shown, self.backbone)
        return self._flow(self._target, scale, self.plan.shown.embedded_guidance_scale)

    def encode(self, window: Any) -> Tensor:
        """Return the latents [1, C, T, h, w] of a window."""
        import torch

        frames = self.plan.fit.frames(self.plan.clip.frames[window.of(self.plan.taken)])
        data = self.backbone.encode_frames(torch.tensor(frames)[None])
        expected = self.backbone.latent_shape(self.shot.num_frames, self.shot.height, self.shot.width)
        if tuple(data.shape[1:]) != tuple(expected):
            raise VgenError(
                f'The latents of "{self.backbone.checkpoint.name}" for {self.shot.num_frames} frames are '
                f"{list(expected)}, and a clip's are {list(data.shape[1:])}: it pads them in a way of its own.",
                tip="choose another number of --frames.",
            )
        return data

    def sharing(self, number: int | None = None) -> Sharing:
        """Return an empty store of features, or with those of window `number` in the inversion's file."""
        from vgen.editing import sharing

        method = self.plan.method
        assert isinstance(method, Inversion)
        schedule = sharing.schedule(method.solve, self.sigmas, num_steps=self.plan.inject, by=method.share)
        found = sharing.sites(self.backbone, method.begin, method.end)
        halved = method.store == "half"
        itemsize = 2 if halved else self.backbone.runtime.torch_dtype.itemsize
        needed = sharing.num_bytes(self.backbone, self.shot, found, schedule, itemsize)
        if schedule.num_features and "store_bytes" not in self.measures:
            self._say_store(needed, method.store)
        store = sharing.STORES[method.store](self.beside)
        if number is not None and schedule.num_features:
            wanted = {sharing.label(key) for key in schedule.read if key is not None}
            for name, value in self._file_features(number):
                if name.rpartition("-")[0] in wanted:
                    store.put(name, value)
        return sharing.Sharing(found, schedule, store)

    def invert(self, data: Tensor, sharing: Sharing) -> Tensor:
        """Return the noise that data comes from, and fill the store."""
        method = self.plan.method
        assert isinstance(method, Inversion)
        with self.stages("invert"):
            flow = self.source_flow()
            noise = inverted(method.solve, sharing.storing(flow), data, self.sigmas, on_step=self.watch.on_step)
            sharing.finish(flow, noise, self.sigmas[0])
            self._count("inversion")
        return noise

    def round_trip(self, data: Tensor, noise: Tensor) -> None:
        """Measure what the inversion loses: back by the source prompt, against what the VAE leaves of the clip."""
        from vgen.metrics import fidelity

        method = self.plan.method
        assert isinstance(method, Inversion)
        with self.stages("check"):
            back = method.solve(self.source_flow(), noise, self.sigmas, on_step=self.watch.on_step)
            self._count("round trip")
            ours, best = (self.backbone.decode(latents, self.shot)[0] for latents in (back, data))
            self._round_trips.append(fidelity.psnr(ours, best))
            self.measures["reconstruction_psnr"] = round(sum(self._round_trips) / len(self._round_trips), 3)

    def edit(self, number: int, window: Any) -> _Part:
        """Return the edit of a window."""
        import torch

        from vgen.editing import masks

        plan, method = self.plan, self.plan.method
        with self.stages("encode"):
            data = self.encode(window)
        frames, height, width = self.shot.num_frames, self.shot.height, self.shot.width
        with self.stages("mask"):
            if plan.mask is not None:
                given = plan.mask if len(plan.mask) > 1 else plan.mask.repeat(len(plan.clip.frames), 0)
                view = plan.fit.map(window.of(given[plan.taken]))
                latent_mask = masks.to_latents(view, (data.shape[2], data.shape[3], data.shape[4])).to(data.device)
            else:
                draw = self._draw("mask")
                differs = masks.difference(self.source_flow(), self.target_flow(guided=False), data, draw)
                latent_mask = masks.from_difference(differs)
                self._count("mask")
            region = masks.to_pixels(latent_mask, frames, height, width).cpu()
        mask = None if plan.request.mask == masks.NONE else masks.soft(latent_mask, 1)

        sharing = None
        if isinstance(method, Inversion):
            from_file = plan.request.noise is not None
            sharing = self.sharing(number if from_file else None)
            start = self._file_noise(number).to(data.device) if from_file else self.invert(data, sharing)
            if not from_file:
                self.round_trip(data, start)
        elif isinstance(method, SDEdit):
            start = (1 - self.sigmas[0]) * data + self.sigmas[0] * self._draw("sdedit")()
        with self.stages("denoise"):
            if isinstance(method, FlowEdit):
                latents = flowedit(
                    self.source_flow(method.source_guidance_scale),
                    self.target_flow(),
                    data,
                    self.sigmas,
                    noise=self._draw("flowedit"),
                    averages=method.averages,
                    mask=mask,
                    on_step=self.watch.on_step,
                )
            else:
                latents = self._denoise(data, start, mask, sharing)
        if sharing is not None:
            sharing.store.close()
        self._count("edit")
        if not bool(latents.isfinite().all()):
            raise VgenError(
                "The model produced values that are not finite.",
                tip="try --dtype float32 or a lower --guidance-scale.",
            )
        with self.stages("decode"):
            made = self.backbone.decode(latents, self.shot)[0].cpu()
        border = None if mask is None else masks.soft(region, plan.request.border or 0)
        return _Part(frames=made, region=torch.as_tensor(region), border=border)

    def _denoise(self, data: Tensor, start: Tensor, mask: Tensor | None, sharing: Sharing | None) -> Tensor:
        """Return the latents at sigma 0 by the target's flow, outside of a mask those of the clip."""
        from vgen.editing import masks
        from vgen.sampling.euler import euler

        method, first = self.plan.method, self.sigmas[0]
        flow = self.target_flow()
        if mask is not None:
            flow = masks.kept(flow, data, (start - (1 - first) * data) / first, mask)
        if sharing is not None:
            flow = sharing.reading(flow)
        solve = method.solve if isinstance(method, Inversion) else euler
        latents = solve(flow, start, self.sigmas, on_step=self.watch.on_step)
        if sharing is not None and sharing.schedule.num_features:
            self.measures["store_hit_rate"] = sharing.hits / sharing.reads
            self.measures["store_bytes"] = sharing.store.num_bytes
        return latents if mask is None else mask * latents + (1 - mask) * data

    def _flow(self, text: Any, scale: float | Callable[[Tensor], float], embedded: float | None) -> Velocity:
        def counted(latents: Tensor, sigma: Tensor, text: Any) -> Tensor:
            self._evaluations += 1
            return self.backbone.velocity(latents, sigma, text, shot=self.shot, guidance_scale=embedded)

        return classifier_free(counted, text, self._negative, scale)

    def _draw(self, what: str) -> Callable[[], Tensor]:
        """Return what draws noise of a window's shape: the same for every window, so that they agree."""
        import torch

        shape = self.backbone.latent_shape(self.shot.num_frames, self.shot.height, self.shot.width)
        seed = int.from_bytes(hashlib.sha256(f"{self.plan.seed} {what}".encode()).digest()[:7], "big")
        generator = runtime.noise_generator(seed)
        return lambda: torch.randn((1, *shape), generator=generator).to(self.backbone.runtime.device)

    def _count(self, what: str) -> None:
        """Note how often the model ran since the last time."""
        counts = self.measures.setdefault("evaluations", {})
        counts[what] = counts.get(what, 0) + self._evaluations
        self._evaluations = 0

    def _say_store(self, needed: int, kind: str) -> None:
        from vgen.hub import readable

        self.measures["store_bytes"] = needed
        place = {"ram": "main memory", "half": "main memory, in half precision", "disk": f"files in {self.beside}"}
        self.watch.on_note(f"V of {self.plan.inject} steps takes {readable(needed)} of {place[kind]}.")
        free = runtime.memory("cpu").free
        if kind != "disk" and needed > SAFE_SHARE * free:
            name = (self.plan.request.method or "").partition(":")[0]
            raise VgenError(
                f"V of {self.plan.inject} steps takes {readable(needed)}; {readable(free)} are free.",
                tip=f"use fewer steps of --inject, or --method {name}:store=half or {name}:store=disk.",
            )

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        """What the inversion's file says, once it was compared with this model."""
        assert self.plan.request.noise is not None
        facts = asked.read_inversion(self.plan.request.noise)
        if facts["checkpoint"]["files"] != manifest.identity(self.backbone.checkpoint)["files"]:
            raise VgenError(f"{self.plan.request.noise} was made by other weights.", tip="invert the clip again.")
        if facts["sigmas"] != self.sigmas.tolist():
            raise VgenError(f"{self.plan.request.noise} has another schedule.", tip="invert the clip again.")
        self.measures["reconstruction_psnr"] = facts["measures"]["reconstruction_psnr"]
        return facts

    def _file_noise(self, number: int) -> Tensor:
        from safetensors import safe_open

        assert self._facts
        with safe_open(self.plan.request.noise, framework="pt") as file:
            noise: Tensor = file.get_slice("noise")[number : number + 1]
        return noise

    def _file_features(self, number: int) -> Iterator[tuple[str, Tensor]]:
        from safetensors import safe_open

        prefix = f"features.{number}."
        with safe_open(self.plan.request.noise, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name.startswith(prefix):
                    yield name.removeprefix(prefix), file.get_tensor(name)


class _Run:
    """A run: its model, its output, its account."""

    def __init__(self, plan: EditPlan, watch: Watch) -> None:
        from vgen import backbones

        self.plan = plan
        self.report = Report(seed=plan.seed)
        self.watch = replace(watch, on_warning=self._warn)
        self._say = watch.on_warning
        watch.on_stage("load")
        start = time.perf_counter()
        chosen = runtime.choose(plan.request.device, plan.request.dtype)
        self.backbone = backbones.load(plan.shown.checkpoint, chosen, progress=watch.download)
        self.timings = {"load": time.perf_counter() - start}

    def write(self, output: Path, edited: Edited, *, compare: bool) -> None:
        """Write the video, its manifest, and with `compare` the clip beside it."""
        import numpy as np

        from vgen import video
        from vgen.editing import footage

        self.watch.on_stage("write")
        start = time.perf_counter()
        clip = self.plan.clip
        fps = clip.fps or self.plan.shown.fps
        sound = None
        if clip.sound_format and output.suffix.lower() not in video.SOUND_ENCODERS:
            self._warn(f"{output.suffix} has no place for the clip's sound.\nTip: write .mp4 or .webm.")
        elif clip.sound_format:
            try:
                sound = footage.sound(clip, len(edited.frames) / fps)
            except VgenError as error:
                self._warn(f"{error.message} The result is silent.")
        made = self._manifest(edited)
        video.save(edited.frames, output, fps=fps, manifest=made, sound=sound)
        files.write_text(manifest.sidecar(output), json.dumps(made, indent=2) + "\n")
        self.report.outputs.append(output)
        if compare:
            beside = output.with_name(f"{output.name}{SIDE_BY_SIDE}")
            video.save(np.concatenate([clip.frames, edited.frames], 2), beside, fps=fps, sound=sound)
            self.report.outputs.append(beside)
        self.timings["write"] = time.perf_counter() - start

    def _manifest(self, edited: Edited) -> manifest.Manifest:
        plan, loaded = self.plan, self.backbone.checkpoint
        made = manifest.build(
            plan.shown,
            self.backbone.runtime,
            checkpoint=manifest.identity(loaded),
            timings=self.timings,
            created=datetime.now().astimezone(),
        )
        request = plan.to_dict() | {"dtype": self.backbone.runtime.dtype}
        given = {"video": plan.request.video, "noise": plan.request.noise}
        if plan.mask is not None and plan.request.mask is not None:
            given["mask"] = Path(plan.request.mask)
        hashes = {f"{name}_sha256": asked.content(path) if path else None for name, path in given.items()}
        method = {"name": plan.request.method, **asdict(plan.method)}
        return made | {
            "task": "edit",
            "request": request,
            **hashes,
            "sampler": None,
            "method": method,
            "measures": edited.measures,
        }

    def _warn(self, message: str) -> None:
        if message not in self.report.warnings:
            self.report.warnings.append(message)
            self._say(message)


@contextmanager
def _running(plan: EditPlan, watch: Watch) -> Iterator[_Run]:
    """Yield a run, and account for it when it is done."""
    begin = time.perf_counter()
    running = _Run(plan, watch)
    yield running
    running.report.timings = {**running.timings, "total": time.perf_counter() - begin}
    running.report.peak_memory_mb = runtime.peak_ram_mb()
    running.report.peak_vram_mb = runtime.peak_vram_mb(running.backbone.runtime)


def _maps(plan: EditPlan, view: Tensor) -> Callable[[int], Tensor]:
    """Return what gives the map [H, W] of a frame of the clip out of maps [F, 1, h, w] of the view."""
    import torch

    width, height = plan.fit.size

    def shown(frame: int) -> Tensor:
        number = int(plan.frame_of[frame])
        part, where = plan.fit.back(view[number : number + 1])
        whole = torch.zeros(height, width)
        whole[where] = part[0, 0].clamp(0, 1)
        return whole

    return shown


def _put_back(plan: EditPlan, view: Tensor, weight: Callable[[int], Tensor]) -> Frames:
    """Return the clip [F, H, W, 3] with what was made of it (`view` [F, 3, h, w]), as strong as `weight` [H, W]."""
    import numpy as np
    import torch

    result = plan.clip.frames.copy()
    for frame in range(len(result)):
        number = int(plan.frame_of[frame])
        part, where = plan.fit.back(view[number : number + 1])
        share = weight(frame)[where][..., None]
        was = torch.from_numpy(result[frame][where]).float()
        blended = (share * part[0].permute(1, 2, 0) + (1 - share) * was).round().clamp(0, 255)
        result[frame][where] = blended.numpy().astype(np.uint8)
    return result


def _rounded(values: dict[str, float]) -> dict[str, float | None]:
    """Return numbers as JSON can hold them: None for what could not be measured."""
    return {name: None if math.isnan(value) else round(value, 4) for name, value in values.items()}
