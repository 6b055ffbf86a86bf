"""From a clip to its edit: encode, invert, denoise towards the target, decode, put back; and how well that went."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import files, manifest, runtime
from vgen.backbones import Shot
from vgen.editing import request as asked
from vgen.editing.methods import FlowEdit, Inversion, SDEdit
from vgen.editing.request import EditPlan, EditRequest
from vgen.errors import VgenError
from vgen.pipelines import run, text_to_video
from vgen.pipelines.run import Job, Report, Watch
from vgen.pipelines.text_to_video import Generation
from vgen.request import Plan
from vgen.sampling.flow import OnStep, Velocity
from vgen.sampling.flowedit import flowedit
from vgen.sampling.guidance import classifier_free
from vgen.sampling.inversion import invert as inverted
from vgen.sampling.inversion import last_steps

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vgen.attention.sparse import SparseAttention
    from vgen.backbones import Backbone
    from vgen.editing.sharing import Sharing
    from vgen.video import Frames

SIDE_BY_SIDE = ".compare.mp4"
SAFE_SHARE = 0.8  # of the free memory, that a store of features may take
LATENTS = "edit"  # the kind of a file with the latents of an edit


@dataclass(frozen=True, kw_only=True)
class Edited:
    """What was made of a clip: frames uint8 [F, H, W, 3] at its own size and rate, and latents [N, C, T, h, w].

    `region` float [F, H, W] is where it was to change, and `measures` say how well it went; `attention` is what sparse
    attention did, where it was asked for.
    """

    frames: Frames
    latents: Tensor
    region: np.ndarray
    measures: dict[str, Any]
    timings: dict[str, float]
    attention: dict[str, Any] | None = None


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
    facts = read_latents(latents)[0]
    request = EditRequest.from_dict({**facts["request"], **changes})
    # The noise has done its part, and an edit that was begun on several GPUs is decoded on one.
    plan = asked.plan(replace(request, noise=None, gpus=None, context_parallel=None))
    plan = replace(plan, request=replace(plan.request, noise=request.noise))
    for name in ("video", "mask"):
        if facts["hashes"].get(f"{name}_sha256") != _hashes(plan).get(f"{name}_sha256"):
            raise VgenError(f"The {name} has changed since {latents} was made of it.", tip="edit the clip again.")
    return Job(plan=plan.shown, output=output, make=functools.partial(_decoded, plan, latents))


def is_edit(path: Path) -> bool:
    """Return whether a file holds the latents of an edit."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("vgen") == LATENTS
    except (OSError, SafetensorError):
        return False


def read_latents(path: Path) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return what a run has left of an edit: its facts, latents [N, C, T, h, w] and masks [N, 1, T, h, w]."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        return facts, file.get_tensor("latents"), file.get_tensor("masks")


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

    work = _Work(plan, backbone, watch, beside)
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

    facts, latents, masks = read_latents(path)
    work = _Work(plan, backbone, watch, path.parent, sigmas=False)
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
    from safetensors.torch import save

    work = _Work(plan, backbone, watch, output.parent)
    noises, features = [], {}
    with torch.inference_mode(), work.attending():
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
    return work.measures, work.stages.timings, work.attention()


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


class _Work:
    """The edit of one clip: what its windows share, and the account of them."""

    def __init__(self, plan: EditPlan, backbone: Backbone, watch: Watch, beside: Path, *, sigmas: bool = True) -> None:
        self.plan, self.backbone, self.watch, self.beside = plan, backbone, watch, beside
        self.stages = text_to_video.Stages(backbone, watch.on_stage)
        self.measures: dict[str, Any] = {}
        self.latents: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.shot: Shot = text_to_video.shot_of(plan.shown)
        self.sparse: SparseAttention | None = None
        self._evaluations = 0
        self._round_trips: list[float] = []
        if not sigmas:
            return
        self.sparse = text_to_video.sparse_attention(plan.shown, backbone)
        self.sigmas = last_steps(
            backbone.sigmas(plan.shown.num_inference_steps, self.shot), plan.request.strength or 1.0
        )
        if float(self.sigmas[-1]) != 0:
            raise VgenError(f'The schedule of "{backbone.checkpoint.name}" does not end at 0, as an inversion begins.')

    def attending(self) -> AbstractContextManager[None]:
        """Return what puts sparse attention into the model, where it is asked for, for as long as it lasts."""
        return nullcontext() if self.sparse is None else self.sparse.attached()

    def attention(self) -> dict[str, Any] | None:
        """Return what sparse attention did."""
        return None if self.sparse is None else self.sparse.to_dict()

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
            noise = inverted(method.solve, sharing.storing(flow), data, self.sigmas, on_step=self._steps())
            sharing.finish(flow, noise, self.sigmas[0])
            self._count("inversion")
        return noise

    def round_trip(self, data: Tensor, noise: Tensor) -> None:
        """Measure what the inversion loses: back by the source prompt, against what the VAE leaves of the clip."""
        from vgen.metrics import fidelity

        method = self.plan.method
        assert isinstance(method, Inversion)
        with self.stages("check"):
            back = method.solve(self.source_flow(), noise, self.sigmas, on_step=self._steps())
            self._count("round trip")
            ours, best = (self.backbone.decode(latents, self.shot)[0] for latents in (back, data))
            self._round_trips.append(fidelity.psnr(ours, best))
            self.measures["reconstruction_psnr"] = round(sum(self._round_trips) / len(self._round_trips), 3)

    def edit(self, number: int, window: Any, *, check: bool) -> None:
        """Put the latents of a window's edit, and the mask of where it was to change, behind those before it."""
        from vgen.editing import masks

        plan, method = self.plan, self.plan.method
        with self.stages("encode"):
            data = self.encode(window)
        with self.stages("mask"):
            latent_mask = self._mask(window, data)
        mask = None if plan.request.mask == masks.NONE else masks.soft(latent_mask, 1)

        sharing = None
        if isinstance(method, Inversion):
            from_file = plan.request.noise is not None
            sharing = self.sharing(number if from_file else None)
            start = self._file_noise(number).to(data.device) if from_file else self.invert(data, sharing)
            if check and not from_file:
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
                    on_step=self._steps(),
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
        self.latents.append(latents.cpu())
        self.masks.append(latent_mask.cpu())

    def save(self, path: Path) -> None:
        """Write what is finished of the latents, with all that it takes to make the video of them."""
        import torch
        from safetensors.torch import save

        facts = {"request": self.plan.to_dict(), "hashes": self._hashed, "measures": self.measures}
        tensors = {
            "latents": torch.cat(self.latents).float().contiguous(),
            "masks": torch.cat(self.masks).contiguous(),
        }
        content = save(tensors, {"vgen": LATENTS, "facts": json.dumps(facts)})
        with files.atomic(path) as part:
            part.write_bytes(content)

    def decode(self, latents: Tensor) -> Tensor:
        """Return frames uint8 [F, h, w, 3] for the latents of a window."""
        with self.stages("decode"):
            return self.backbone.decode(latents.to(self.backbone.runtime.device), self.shot)[0].cpu()

    def finished(self, made: Sequence[Tensor]) -> Edited:
        """Return the clip with what was made of its windows put back, and measured against what it was."""
        import torch

        from vgen.editing import fitting, masks

        plan, shot = self.plan, self.shot
        with self.stages("measure"):
            shown = [masks.to_pixels(mask, shot.num_frames, shot.height, shot.width)[:, None] for mask in self.masks]
            count = len(plan.taken)
            view = fitting.joined([frames.permute(0, 3, 1, 2).float() for frames in made], plan.windows, count)
            region = _maps(plan, fitting.joined(shown, plan.windows, count))
            done = [torch.full_like(mask, float(number < len(self.latents))) for number, mask in enumerate(shown)]
            if plan.mask is not None:
                own = masks.soft(torch.from_numpy(plan.mask), plan.request.border or 0)
                edited = _maps(plan, fitting.joined(done, plan.windows, count))
                frames = _put_back(plan, view, lambda frame: own[min(frame, len(own) - 1)] * edited(frame))
                whole = (torch.from_numpy(plan.mask) > 0.5).float().expand(len(frames), -1, -1).numpy()
            else:
                if plan.request.mask == masks.AUTO:
                    done = [masks.soft(mask, plan.request.border or 0) for mask in shown]
                frames = _put_back(plan, view, _maps(plan, fitting.joined(done, plan.windows, count)))
                whole = torch.stack([region(frame) for frame in range(len(frames))]).numpy()
            measures = self.measures | measured(plan.clip.frames, frames, whole)
        return Edited(
            frames=frames,
            latents=torch.cat(self.latents),
            region=whole,
            measures=measures,
            timings=self.stages.timings,
            attention=self.attention(),
        )

    def _mask(self, window: Any, data: Tensor) -> Tensor:
        """Return where a window is to change: [1, 1, T, h, w]."""
        from vgen.editing import masks

        plan = self.plan
        if plan.mask is not None:
            given = plan.mask if len(plan.mask) > 1 else plan.mask.repeat(len(plan.clip.frames), 0)
            view = plan.fit.map(window.of(given[plan.taken]))
            return masks.to_latents(view, (data.shape[2], data.shape[3], data.shape[4])).to(data.device)
        self._steps()
        target = self.target_flow(guided=False)
        found = masks.from_difference(masks.difference(self.source_flow(), target, data, self._draw("mask")))
        self._count("mask")
        return found

    def _steps(self) -> OnStep:
        """Return what is told of the steps of one way; sparse attention begins anew with it."""
        if self.sparse is None:
            return self.watch.on_step
        self.sparse.begin(len(self.sigmas) - 1)
        return self.sparse.counting(self.watch.on_step)

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
        latents = solve(flow, start, self.sigmas, on_step=self._steps())
        if sharing is not None and sharing.schedule.num_features:
            self.measures["store_hit_rate"] = sharing.hits / sharing.reads
            self.measures["store_bytes"] = sharing.store.num_bytes
        return latents if mask is None else mask * latents + (1 - mask) * data

    def _flow(self, text: Any, scale: float | Callable[[Tensor], float], embedded: float | None) -> Velocity:
        def counted(latents: Tensor, sigma: Tensor, text: Any) -> Tensor:
            self._evaluations += 1
            return self.backbone.velocity(latents, sigma, text, shot=self.shot, guidance_scale=embedded)

        velocity = counted if self.sparse is None else self.sparse.branching(counted)
        return classifier_free(velocity, text, self._negative, scale)

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
    def _hashed(self) -> dict[str, str | None]:
        """The sha256 of the files that the edit is made of, which are read once for all windows."""
        return _hashes(self.plan)

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        """What the inversion's file says, once it was compared with this model."""
        assert self.plan.request.noise is not None
        facts = asked.read_inversion(self.plan.request.noise)
        now = manifest.identity(self.backbone.checkpoint)
        if any(facts["checkpoint"].get(name) != now.get(name) for name in ("files", "loras")):
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
            **_hashes(plan),
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


def _hashes(plan: EditPlan) -> dict[str, str | None]:
    """Return the sha256 of the files that an edit is made of, by the names that a manifest has for them."""
    given = {"video": plan.request.video, "noise": plan.request.noise}
    if plan.mask is not None and plan.request.mask is not None:
        given["mask"] = Path(plan.request.mask)
    return {f"{name}_sha256": asked.content(path) if path else None for name, path in given.items()}


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
