"""From a plan to frames: encode the prompt, denoise, decode."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import attention, caching, options
from vgen import latents as kept
from vgen.backbones import Shot
from vgen.caching.skipping import Skipped
from vgen.conditioning import given
from vgen.conditioning.frames import GivenImages, ImageCondition
from vgen.conditioning.images import cut_note, fit_image, open_image
from vgen.errors import VgenError
from vgen.plan import Plan
from vgen.plan import plan as planned
from vgen.runtime import noise_generator, synchronize
from vgen.sampling import SAMPLERS, bind
from vgen.sampling.flow import OnStep
from vgen.sampling.guidance import classifier_free, read_interval
from vgen.sampling.schedule import at_timesteps

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vgen.attention.sparse import SparseAttention
    from vgen.backbones import Backbone
    from vgen.video import Sound

# Called when a stage begins, with its name: "encode", "denoise" or "decode".
OnStage = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished video, its latents, the seconds that each stage took, and the sound of a model that makes one.

    frames uint8 [F, H, W, 3]; latents float32 [N, C, T, h, w] on the CPU, one for each window of the video; `windows`
    are what these decode to, before anything that was given is put back; `skipped` is what a cache has saved,
    `attention` what sparse attention did, where it was asked for, and `facts` are what its maker measured. An edit has
    a rate `fps` of its own, `measures`, and what is `told` in the manifest besides or in the place of a plan's.
    """

    frames: np.ndarray
    latents: Tensor
    windows: Sequence[np.ndarray]
    timings: dict[str, float]
    sound: Sound | None = None
    skipped: Skipped | None = None
    facts: dict[str, float] = field(default_factory=dict)
    attention: dict[str, Any] | None = None
    fps: float | None = None
    told: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, Any] | None = None


def generate(
    plan: Plan,
    backbone: Backbone,
    *,
    on_stage: OnStage | None = None,
    on_step: OnStep | None = None,
    on_warning: Callable[[str], None] = lambda message: None,
    save_latents: Callable[[Tensor], None] | None = None,
    sparse: SparseAttention | None = None,
) -> Generation:
    """Return the video that a plan describes, made by a loaded backbone.

    `on_step(i, n)` is called after step i of n; `on_warning`, before the first, with what the user should know.
    `save_latents` gets the final latents [N, C, T, h, w] of the windows so far, before the last is decoded, so that
    nothing is lost when that fails. `sparse` is what `sparse_attention` returns for the plan, where the caller wants
    to look into it. Raises `VgenError` when the result is not finite.
    """
    import torch

    stages = Stages(backbone, on_stage)
    sampler = options.parse(plan.sampler, SAMPLERS, what="sampler")
    for warning in prompt_warnings(plan, backbone):
        on_warning(warning)

    sparse = sparse or sparse_attention(plan, backbone)
    used = given.of(plan)
    num_windows = 1 if used is None else used.num_windows
    made: list[np.ndarray] = []
    all_latents: list[Tensor] = []
    skipped: Skipped | None = None
    with torch.inference_mode(), nullcontext() if sparse is None else sparse.attached():
        with stages("encode"):
            shot = shot_of(plan)
            images = _given_images(plan, on_warning) if used is None else None
            (text,) = backbone.encode_prompt([plan.prompt], images)
            (negative,) = backbone.encode_prompt([plan.negative_prompt]) if plan.cfg_scale > 1 else (None,)

        for window in range(num_windows):
            with stages("encode"):
                image = ImageCondition()
                if used is not None:
                    image = ImageCondition(known=used.canvas(made).encode(backbone, shot))
                elif images is not None:
                    image = backbone.encode_images(images, shot)

            with stages("denoise"), caching.applied(plan.cache, backbone, plan.num_inference_steps) as cached:
                noise = backbone.noise(shot)
                known = None if image.known is None else image.known.padded(noise.shape[2])
                by_timestep = plan.known_frames != "reinject"
                velocity: Callable[..., Tensor] = functools.partial(
                    backbone.velocity,
                    known=known.mask if known is not None and by_timestep else None,
                    shot=shot,
                    image=image.inputs,
                    guidance_scale=plan.embedded_guidance_scale,
                )
                sigmas = _sigmas(plan, backbone, shot)
                steps = _in_windows(on_step, window, num_windows)
                if sparse is not None:
                    sparse.begin(len(sigmas) - 1)
                    velocity, steps = sparse.branching(velocity), sparse.counting(steps)
                flow = classifier_free(velocity, text, negative, guidance_scale_of(plan, backbone), cached.branch)
                if known is not None:
                    flow = known.held(flow) if by_timestep else known.reinjected(flow, noise)
                solve = bind(
                    sampler, lambda: backbone.native_scheduler(plan.num_inference_steps, shot), shot.generator
                )
                latents = solve(flow, image.start(noise), sigmas, on_step=steps)
                latents = latents if known is None else known.hold(latents)

            if cached.skipped is not None:
                skipped = cached.skipped if skipped is None else skipped + cached.skipped
            if not bool(latents.isfinite().all()):
                raise VgenError(
                    "The model produced values that are not finite, which would decode to noise.",
                    tip="try --dtype float32, another --seed or a lower --guidance-scale.",
                )
            all_latents.append(latents.cpu())
            if save_latents is not None:
                save_latents(torch.cat(all_latents))
            with stages("decode"):
                made.append(backbone.decode(latents, shot)[0].cpu().numpy())
                # A sound of windows would not be one, and that of a video is not the model's.
                sound = backbone.decode_sound(latents, shot) if plan.video is None else None
    frames = made[0] if used is None else used.finish(made)
    return Generation(
        frames=frames,
        latents=torch.cat(all_latents),
        windows=made,
        timings=stages.timings,
        sound=sound,
        skipped=skipped,
        attention=None if sparse is None else sparse.to_dict(),
    )


def sparse_attention(plan: Plan, backbone: Backbone) -> SparseAttention | None:
    """Return the attention that a plan asks for, for its token grid; None where it is left to the model."""
    if plan.attention is None:
        return None
    from vgen.attention.sparse import SparseAttention

    grid = backbone.token_grid(plan.num_frames, plan.height, plan.width)
    return SparseAttention(attention.parse(plan.attention), backbone, grid)


def decode_latents(path: Path, backbone: Backbone, *, on_stage: OnStage | None = None) -> Generation:
    """Return the video of a file of `vgen.latents`; `timings` has "decode" only.

    Of a clip that was to go on, it goes on for as many windows as there are.
    """
    import torch

    latents, request = kept.load(path)
    plan = planned(request, backbone.checkpoint)
    shot = shot_of(plan)
    used = given.of(plan)
    stages = Stages(backbone, on_stage)
    with torch.inference_mode(), stages("decode"):
        windows = [latents[i : i + 1].to(backbone.runtime.device) for i in range(len(latents))]
        made = [backbone.decode(window, shot)[0].cpu().numpy() for window in windows]
        sound = backbone.decode_sound(windows[0], shot) if plan.video is None else None
    frames = made[0] if used is None else used.finish(made)
    return Generation(frames=frames, latents=latents, windows=made, timings=stages.timings, sound=sound)


def rebuild(plan: Plan, frames: np.ndarray, backbone: Backbone, *, on_stage: OnStage | None = None) -> Generation:
    """Return what the VAE leaves of frames uint8 [F, H, W, 3]: the best that a model could make of a plan."""
    import torch

    stages = Stages(backbone, on_stage)
    with torch.inference_mode():
        with stages("encode"):
            latents = backbone.encode_frames(torch.tensor(frames)[None])
        with stages("decode"):
            rebuilt = backbone.decode(latents, shot_of(plan))[0].cpu().numpy()
    return Generation(frames=rebuilt, latents=latents.cpu(), windows=[rebuilt], timings=stages.timings)


@dataclass
class Stages:
    """Announces stages as they change and measures them in wall seconds."""

    backbone: Backbone
    on_stage: OnStage | None
    timings: dict[str, float] = field(default_factory=dict)
    name: str = ""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.on_stage is not None and name != self.name:
            self.on_stage(name)
        self.name = name
        start = time.perf_counter()
        yield
        synchronize(self.backbone.runtime)
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start


def shot_of(plan: Plan) -> Shot:
    """Return what a plan says of the video to be made."""
    return Shot(
        num_frames=plan.num_frames,
        height=plan.height,
        width=plan.width,
        fps=plan.fps,
        generator=noise_generator(plan.seed),
    )


def _given_images(plan: Plan, on_warning: Callable[[str], None]) -> GivenImages | None:
    import torch

    def frame(path: Path) -> Tensor:
        image = open_image(path)
        if note := cut_note("The image", image.size, (plan.width, plan.height)):
            on_warning(note)
        return torch.tensor(fit_image(image, plan.width, plan.height))[None, None]

    if plan.image is None:
        return None
    return GivenImages(first=frame(plan.image), last=None if plan.last_image is None else frame(plan.last_image))


def _in_windows(on_step: OnStep | None, window: int, num_windows: int) -> OnStep | None:
    """Return what counts the steps of one window among those of all."""
    if on_step is None:
        return None
    return lambda step, num_steps: on_step(window * num_steps + step, num_windows * num_steps)


def _sigmas(plan: Plan, backbone: Backbone, shot: Shot) -> Tensor:
    defaults = plan.checkpoint.defaults
    if defaults.timesteps:
        return at_timesteps(defaults.timesteps, defaults.shift)
    return backbone.sigmas(plan.num_inference_steps, shot)


def guidance_scale_of(plan: Plan, backbone: Backbone) -> float | Callable[[Tensor], float]:
    """Return the scale of classifier-free guidance, by sigma where that changes it."""
    first, second = plan.cfg_scale, plan.guidance_scale_2
    if second is None and plan.guidance_interval is None:
        return first
    low, high = read_interval(plan.guidance_interval or "0-1")

    def scale(sigma: Tensor) -> float:
        if not low < float(sigma) <= high:
            return 1.0
        return second if second is not None and backbone.is_below_boundary(sigma) else first

    return scale


def prompt_warnings(plan: Plan, backbone: Backbone) -> list[str]:
    """Return what the user should know of how the model reads a prompt."""
    warnings = []
    if unknown := backbone.unknown_words(plan.prompt):
        words = ", ".join(f'"{word}"' for word in unknown)
        warnings.append(
            f"The model has never seen {words}. {plan.checkpoint.knows}".rstrip()
            + "\nTip: for anything else use a larger model, --model FOLDER_OR_HUB_ID."
        )
    read = plan.checkpoint.defaults.max_sequence_length
    if (num_tokens := backbone.num_tokens(plan.prompt)) > read:
        warnings.append(f"The prompt has {num_tokens} tokens, but the model reads the first {read}.")
    return warnings
