"""What a request becomes with a checkpoint's defaults and rules applied: everything decided, and nothing loaded."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from vgen import attention, caching, legal, loras, options, parallel, performance, runtime
from vgen.checkpoints import Checkpoint
from vgen.conditioning import given, known_frames
from vgen.errors import UsageError
from vgen.performance import Settings
from vgen.request import GenerateRequest, json_safe
from vgen.sampling import SAMPLERS
from vgen.sampling.guidance import read_interval

MAX_GPUS = 64  # of one machine

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One video with everything decided: a legal size and length, a seed, and the checkpoint that makes it.

    `num_frames` is what the model makes at once: the video is longer where a clip goes on, and may be shorter where
    one is completed. `known_frames` is None where no frames are known, and `gpus` where there is one. `notes` says in
    sentences what was rounded, cut or resampled and how, and what was chosen for the machine, which `settings` has.
    `device` and `dtype` may still be "auto".
    """

    prompt: str
    negative_prompt: str
    model: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    true_cfg_scale: float | None
    guidance_interval: str | None
    width: int
    height: int
    num_frames: int
    fps: float
    sampler: str
    lora: tuple[str, ...] | None
    image: Path | None
    last_image: Path | None
    interpolate: tuple[str, ...] | None
    video: Path | None
    extend: float | None
    mask: Path | None
    missing: str | None
    known_frames: str | None
    attention: str | None
    cache: str | None
    performance: str
    offload: str
    compile: bool | None
    device: str
    dtype: str
    gpus: int | None
    context_parallel: str | None
    checkpoint: Checkpoint
    settings: Settings
    notes: tuple[str, ...] = ()

    @property
    def cfg_scale(self) -> float:
        """The scale of classifier-free guidance, under whichever name the checkpoint has it."""
        return self.guidance_scale if self.true_cfg_scale is None else self.true_cfg_scale

    @property
    def embedded_guidance_scale(self) -> float | None:
        """The scale that is an input of the model, where it takes one."""
        return self.guidance_scale if self.checkpoint.can.embedded_guidance else None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as values that JSON can hold and `GenerateRequest.from_dict` reads."""
        left_out = ("checkpoint", "settings", "notes")
        return {f.name: json_safe(getattr(self, f.name)) for f in fields(self) if f.name not in left_out}


def plan(request: GenerateRequest, checkpoint: Checkpoint) -> Plan:
    """Return the request with the checkpoint's defaults filled in, checked against the checkpoint's rules.

    Sizes and frame counts that are not legal are refused with the two nearest legal values; only `seconds` is rounded,
    to the nearest legal frame count, and a note says so. No torch is imported. Raises `UsageError`.
    """
    defaults = checkpoint.defaults
    if not request.prompt.strip():
        raise UsageError("The prompt is empty.", tip='say what to show: vgen generate "a red ball bounces on grass".')
    fps = legal.fps(_given(request.fps, defaults.fps))
    notes: list[str] = []
    sampler = _given(request.sampler, defaults.sampler)
    options.parse(sampler, SAMPLERS, what="sampler")
    num_inference_steps = legal.num_inference_steps(_given(request.num_inference_steps, defaults.num_inference_steps))
    _check_student(num_inference_steps, sampler, checkpoint)
    if request.attention is not None:
        attention.parse(request.attention)
    if request.guidance_interval is not None:
        read_interval(request.guidance_interval)
    runtime.check_names(request.device, request.dtype)
    checkpoint = _with_loras(checkpoint, request.lora)
    settings = settle(request, checkpoint)
    if request.cache is not None:
        caching.check(request.cache, checkpoint, sampler=sampler, is_compiled=settings.compile)
    told = known_frames.way_of(request, checkpoint)
    width, height = legal.size(*_frame_size(request, checkpoint), checkpoint)
    made = Plan(
        prompt=request.prompt,
        negative_prompt=_given(request.negative_prompt, defaults.negative_prompt),
        model=request.model,
        seed=secrets.randbelow(2**32) if request.seed is None else legal.seed(request.seed),
        num_inference_steps=num_inference_steps,
        guidance_scale=legal.guidance_scale(_given(request.guidance_scale, defaults.guidance_scale)),
        guidance_scale_2=_guidance_scale_2(request, checkpoint),
        true_cfg_scale=_true_cfg_scale(request.true_cfg_scale, checkpoint),
        guidance_interval=request.guidance_interval,
        width=width,
        height=height,
        num_frames=_num_frames(request, fps, checkpoint, notes),
        fps=fps,
        sampler=sampler,
        lora=request.lora or None,
        image=request.image,
        last_image=request.last_image,
        interpolate=request.interpolate or None,
        video=request.video,
        extend=request.extend,
        mask=request.mask,
        missing=request.missing,
        known_frames=told,
        attention=request.attention,
        cache=request.cache,
        performance=request.performance,
        offload=request.offload,
        compile=request.compile,
        device=request.device,
        dtype=request.dtype,
        gpus=_gpus(request),
        context_parallel=_context_parallel(request),
        checkpoint=checkpoint,
        settings=settings,
        notes=(*notes, *settings.notes),
    )
    if request.guidance_interval is not None and made.cfg_scale <= 1:
        note = f"--guidance-interval changes nothing: at a scale of {made.cfg_scale:g} there is no guidance."
        made = replace(made, notes=(*made.notes, note))
    _check_attention(made)
    check_parallel(made)
    used = given.of(made)
    return made if used is None else replace(made, notes=(*made.notes, *used.notes))


def _check_attention(made: Plan) -> None:
    """Raise `UsageError` for sparse attention beside what it cannot be combined with."""
    if made.attention is None or made.gpus is None or made.context_parallel is None:
        return
    _, ring = parallel.degrees(made.context_parallel, made.gpus)
    if ring > 1:
        raise UsageError(
            f"--attention does not go together with --context-parallel {made.context_parallel}: in a ring no GPU has "
            "all keys of a head, of which a block of queries sees some.",
            tip="use --context-parallel ulysses, which gives each GPU whole sequences of some heads.",
        )


def check_parallel(made: Plan) -> None:
    """Raise `UsageError` for a plan on several GPUs that its checkpoint, as far as it is here, cannot follow."""
    if made.gpus is not None and made.context_parallel is not None:
        # Both put hooks on the same blocks, and nobody has tried them together.
        untried = {
            "--cache": made.cache is not None,
            "--compile": made.settings.compile,
            "--offload": made.settings.offload not in (None, "none"),
        }
        for option in (option for option, used in untried.items() if used):
            raise UsageError(
                f"{option} does not go together with --gpus.",
                tip="leave out one of them: with --offload none or --no-compile where --performance has chosen it.",
            )
        tokens = parallel.num_tokens(made.num_frames, made.height, made.width, made.checkpoint.rules)
        parallel.check(
            made.gpus, made.context_parallel, made.checkpoint, device=made.device, dtype=made.dtype, tokens=tokens
        )


def settle(asked: GenerateRequest | Plan, checkpoint: Checkpoint) -> Settings:
    """Return how the checkpoint is fitted to this machine; raise `UsageError` for what cannot be here."""
    return performance.settle(
        checkpoint,
        performance=asked.performance,
        offload=asked.offload,
        compiled=asked.compile,
        device=asked.device,
        dtype=asked.dtype,
    )


def _num_frames(request: GenerateRequest, fps: float, checkpoint: Checkpoint, notes: list[str]) -> int:
    rules = checkpoint.rules
    if request.seconds is None:
        return legal.num_frames(_given(request.num_frames, _default_num_frames(request, fps, checkpoint)), rules)
    if request.extend is not None:
        raise UsageError(
            "Both --seconds and --extend are given.", tip="--extend says how long; --frames is what is made at once."
        )
    if request.num_frames is not None:
        raise UsageError("Both frames and seconds are given.", tip="use --frames or --seconds, not both.")
    seconds = request.seconds
    longest = rules.max_frames / fps
    if not (math.isfinite(seconds) and 0 < seconds <= longest):
        raise UsageError(
            f"{seconds:g} seconds are not legal: this model takes more than 0 and up to {longest:g} at {fps:g} frames "
            "per second.",
            tip=f"use --seconds {checkpoint.defaults.num_frames / fps:g}.",
        )
    wanted = seconds * fps
    value = legal.closest_num_frames(wanted, rules)
    if value != wanted:
        notes.append(
            f"{seconds:g} s at {fps:g} frames per second are {wanted:g} frames; rounded to {value}, the nearest legal "
            f"number ({value / fps:.4g} s)."
        )
    return value


def _check_student(num_inference_steps: int, sampler: str, checkpoint: Checkpoint) -> None:
    """Raise `UsageError` unless a few-step student is to make its steps, at the noise levels that it knows."""
    timesteps = checkpoint.defaults.timesteps
    if not timesteps:
        return
    if num_inference_steps != len(timesteps):
        levels = ", ".join(map(str, timesteps))
        raise UsageError(
            f'{num_inference_steps} steps are not legal: "{checkpoint.name}" was distilled for {len(timesteps)}, at '
            f"the timesteps {levels}.",
            tip=f"leave out --steps, or use --steps {len(timesteps)}.",
        )
    if sampler.partition(":")[0].strip() == "native":
        raise UsageError(
            f'The sampler "native" has other noise levels than those that "{checkpoint.name}" was distilled for.',
            tip=f"leave out --sampler, or use --sampler {checkpoint.defaults.sampler}.",
        )


def _with_loras(checkpoint: Checkpoint, asked: tuple[str, ...] | None) -> Checkpoint:
    if not asked:
        return checkpoint
    if not checkpoint.can.lora:
        raise UsageError(
            f'The model "{checkpoint.name}" takes no LoRAs: diffusers cannot read any for its family.',
            tip="leave out --lora, or use another model; vgen models show tells what one can do.",
        )
    own = tuple(lora for lora in checkpoint.loras if not lora.text)
    wanted = loras.asked(asked, two_transformers=checkpoint.can.two_transformers)
    return replace(checkpoint, loras=(*own, *wanted))


def _guidance_scale_2(request: GenerateRequest, checkpoint: Checkpoint) -> float | None:
    if request.guidance_scale_2 is not None:
        if not checkpoint.can.two_transformers:
            raise UsageError(
                f'The model "{checkpoint.name}" has one transformer, and so one guidance scale.',
                tip="use --guidance-scale alone.",
            )
        return legal.guidance_scale(request.guidance_scale_2)
    # As in diffusers, one scale that is given is for both; the checkpoint's two go together.
    return checkpoint.defaults.guidance_scale_2 if request.guidance_scale is None else None


def _true_cfg_scale(guidance_scale: float | None, checkpoint: Checkpoint) -> float | None:
    if not checkpoint.can.embedded_guidance:
        if guidance_scale is None:
            return None
        raise UsageError(
            f'The guidance of the model "{checkpoint.name}" is classifier-free already.', tip="use --guidance-scale."
        )
    return legal.guidance_scale(_given(guidance_scale, 1.0))


def _frame_size(request: GenerateRequest, checkpoint: Checkpoint) -> tuple[int, int]:
    """Return (width, height): where none is given, a clip's own if the model takes it, else the checkpoint's."""
    if request.video is not None and request.width is None and request.height is None:
        from vgen.conditioning import clips

        height, width = clips.read(request.video).frames.shape[1:3]
        rules = checkpoint.rules
        is_legal = all(side % rules.size_multiple == 0 and side <= rules.max_size for side in (width, height))
        if is_legal and (not rules.fixed_size or (width, height) in checkpoint.sizes):
            return width, height
    return _given(request.width, checkpoint.defaults.width), _given(request.height, checkpoint.defaults.height)


def _default_num_frames(request: GenerateRequest, fps: float, checkpoint: Checkpoint) -> int:
    """Return the checkpoint's number, or for a clip that is completed the lowest legal one that holds it."""
    if request.video is None or request.extend is not None:
        return checkpoint.defaults.num_frames
    from vgen.conditioning import clips

    num_frames, rules = len(clips.at_rate(clips.read(request.video), fps)), checkpoint.rules
    if num_frames > rules.max_frames:
        raise UsageError(
            f"The clip has {num_frames} frames, and this model takes up to {rules.max_frames}.",
            tip=f"use --frames {rules.max_frames} for its beginning.",
        )
    return legal.nearest_num_frames(num_frames, rules)[-1]


def _gpus(request: GenerateRequest) -> int | None:
    """Return how many GPUs share a video; None for one."""
    if request.gpus is not None and not 1 <= request.gpus <= MAX_GPUS:
        raise UsageError(
            f"A video cannot be made on {request.gpus} GPUs.", tip=f"use --gpus 2 to {MAX_GPUS}, or leave it out."
        )
    return None if request.gpus == 1 else request.gpus


def _context_parallel(request: GenerateRequest) -> str | None:
    if _gpus(request) is not None:
        return _given(request.context_parallel, parallel.DEFAULT)
    if request.context_parallel is not None and request.gpus is None:
        raise UsageError(
            "--context-parallel says how GPUs share a video, and there is one.", tip="give their number with --gpus."
        )
    return None


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
