"""The edit of one clip at work: its prompts, its windows one by one, and the account of them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import manifest, runtime
from vgen.backbones import Shot
from vgen.editing import inversions
from vgen.editing import latents as kept
from vgen.editing.methods import FlowEdit, Inversion, SDEdit
from vgen.editing.plan import EditPlan
from vgen.editing.putting_back import maps, measured, put_back
from vgen.errors import VgenError
from vgen.integrity import clip_sha256
from vgen.pipelines import text_to_video
from vgen.pipelines.run import Watch
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

SAFE_SHARE = 0.8  # of the free memory, that a store of features may take


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


class Work:
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
        if number is not None and self.plan.request.noise is not None and schedule.num_features:
            wanted = {sharing.label(key) for key in schedule.read if key is not None}
            for name, value in inversions.features_of(self.plan.request.noise, number):
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
        facts = {"request": self.plan.to_dict(), "hashes": self._hashed, "measures": self.measures}
        kept.save(path, facts, self.latents, self.masks)

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
            region = maps(plan, fitting.joined(shown, plan.windows, count))
            done = [torch.full_like(mask, float(number < len(self.latents))) for number, mask in enumerate(shown)]
            if plan.mask is not None:
                own = masks.soft(torch.from_numpy(plan.mask), plan.request.border or 0)
                edited = maps(plan, fitting.joined(done, plan.windows, count))
                frames = put_back(plan, view, lambda frame: own[min(frame, len(own) - 1)] * edited(frame))
                whole = (torch.from_numpy(plan.mask) > 0.5).float().expand(len(frames), -1, -1).numpy()
            else:
                if plan.request.mask == masks.AUTO:
                    done = [masks.soft(mask, plan.request.border or 0) for mask in shown]
                frames = put_back(plan, view, maps(plan, fitting.joined(done, plan.windows, count)))
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
            noise = (start - (1 - first) * data) / first
            if isinstance(method, Inversion) and method.fresh and not bool((mask == 1).all()):
                noise = masks.renewed(noise, self._draw("fresh")(), method.fresh * mask)
                start = (1 - first) * data + first * noise
            flow = masks.kept(flow, data, noise, mask)
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
        return hashes(self.plan)

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        """What the inversion's file says, once it was compared with this model."""
        assert self.plan.request.noise is not None
        facts = inversions.facts_of(self.plan.request.noise)
        now = manifest.identity(self.backbone.checkpoint)
        if any(facts["checkpoint"].get(name) != now.get(name) for name in ("files", "loras")):
            raise VgenError(f"{self.plan.request.noise} was made by other weights.", tip="invert the clip again.")
        if facts["sigmas"] != self.sigmas.tolist():
            raise VgenError(f"{self.plan.request.noise} has another schedule.", tip="invert the clip again.")
        self.measures["reconstruction_psnr"] = facts["measures"]["reconstruction_psnr"]
        return facts

    def _file_noise(self, number: int) -> Tensor:
        assert self._facts and self.plan.request.noise is not None
        return inversions.noise_of(self.plan.request.noise, number)


def hashes(plan: EditPlan) -> dict[str, str | None]:
    """Return the sha256 of the files that an edit is made of, by the names that a manifest has for them."""
    given = {"video": plan.request.video, "noise": plan.request.noise}
    if plan.mask is not None and plan.request.mask is not None:
        given["mask"] = Path(plan.request.mask)
    return {f"{name}_sha256": clip_sha256(path) if path else None for name, path in given.items()}
