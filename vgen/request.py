"""What the user asked for, and the plan that it becomes once a checkpoint's defaults and rules are applied."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from vgen import options, runtime
from vgen.checkpoints import Checkpoint, Rules
from vgen.errors import UsageError
from vgen.sampling import SAMPLERS

MAX_SEED = 2**63 - 1

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One video as asked for; None means "as the checkpoint says".

    `width` and `height` are in pixels, `seconds` is an alternative to `num_frames`, `fps` is in frames per second,
    `sampler` is `name` or `name:key=value`, and `image` and `last_image` are the paths of the first and the last
    frame. As in diffusers, `guidance_scale_2` is for the second of two transformers, and `true_cfg_scale` is
    classifier-free guidance for a model that takes `guidance_scale` as an input.
    """

    prompt: str
    negative_prompt: str | None = None
    model: str = "toyland"
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    true_cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    seconds: float | None = None
    fps: float | None = None
    sampler: str | None = None
    image: Path | None = None
    last_image: Path | None = None
    device: str = "auto"
    dtype: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        """Return the request as values that JSON can hold."""
        return {field.name: _json_safe(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerateRequest:
        """Return the request that `to_dict` of a request or of a plan wrote.

        Raises `UsageError` when the prompt is missing, a field is unknown or a value is of another type.
        """
        known = {field.name: str(field.type) for field in fields(cls)}
        unknown = [key for key in values if key not in known]
        if unknown:
            raise UsageError(f'A request has no field "{unknown[0]}".', tip=f"its fields are: {', '.join(known)}.")
        if "prompt" not in values:
            raise UsageError("The request has no prompt.", tip='give it one: {"prompt": "..."}.')
        return cls(**{key: _from_json(key, known[key], value) for key, value in values.items()})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One video with everything decided: a legal size and length, a seed, and the checkpoint that makes it.

    `notes` says in sentences what was rounded and how. `device` and `dtype` may still be "auto".
    """

    prompt: str
    negative_prompt: str
    model: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    true_cfg_scale: float | None
    width: int
    height: int
    num_frames: int
    fps: float
    sampler: str
    image: Path | None
    last_image: Path | None
    device: str
    dtype: str
    checkpoint: Checkpoint
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
        left_out = ("checkpoint", "notes")
        return {f.name: _json_safe(getattr(self, f.name)) for f in fields(self) if f.name not in left_out}


def plan(request: GenerateRequest, checkpoint: Checkpoint) -> Plan:
    """Return the request with the checkpoint's defaults filled in, checked against the checkpoint's rules.

    Sizes and frame counts that are not legal are refused with the two nearest legal values; only `seconds` is rounded,
    to the nearest legal frame count, and a note says so. No torch is imported. Raises `UsageError`.
    """
    defaults, rules = checkpoint.defaults, checkpoint.rules
    if not request.prompt.strip():
        raise UsageError("The prompt is empty.", tip='say what to show: vgen generate "a red ball bounces on grass".')
    fps = _given(request.fps, defaults.fps)
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise UsageError(f"{fps:g} frames per second cannot be written.", tip="choose more than 0 and at most 1000.")
    notes: list[str] = []
    sampler = _given(request.sampler, defaults.sampler)
    options.parse(sampler, SAMPLERS, what="sampler")
    runtime.check_names(request.device, request.dtype)
    _check_images(request, checkpoint)
    width = _size("width", _given(request.width, defaults.width), rules)
    height = _size("height", _given(request.height, defaults.height), rules)
    _check_fixed_size(width, height, checkpoint)
    return Plan(
        prompt=request.prompt,
        negative_prompt=_given(request.negative_prompt, defaults.negative_prompt),
        model=request.model,
        seed=_seed(request.seed),
        num_inference_steps=_steps(_given(request.num_inference_steps, defaults.num_inference_steps)),
        guidance_scale=_guidance_scale(_given(request.guidance_scale, defaults.guidance_scale)),
        guidance_scale_2=_guidance_scale_2(request, checkpoint),
        true_cfg_scale=_true_cfg_scale(request.true_cfg_scale, checkpoint),
        width=width,
        height=height,
        num_frames=_num_frames(request, fps, checkpoint, notes),
        fps=fps,
        sampler=sampler,
        image=request.image,
        last_image=request.last_image,
        device=request.device,
        dtype=request.dtype,
        checkpoint=checkpoint,
        notes=tuple(notes),
    )


def nearest_legal(value: float, *, multiple: int, offset: int, lowest: int, highest: int) -> tuple[int, ...]:
    """Return the legal numbers (`multiple` * k + `offset`, within bounds) just under and over `value`, lower first.

    There is one only where `value` is legal itself or lies outside the bounds.
    """
    under = math.floor((value - offset) / multiple) * multiple + offset
    over = math.ceil((value - offset) / multiple) * multiple + offset
    return tuple(sorted({min(max(near, lowest), highest) for near in (under, over)}))


def _size(name: str, value: int, rules: Rules) -> int:
    legal = nearest_legal(
        value, multiple=rules.size_multiple, offset=0, lowest=rules.size_multiple, highest=rules.max_size
    )
    if value not in legal:
        raise UsageError(
            f"A {name} of {value} is not legal: this model takes multiples of {rules.size_multiple} from "
            f"{rules.size_multiple} to {rules.max_size}.",
            tip=f"use {' or '.join(f'--{name} {near}' for near in legal)}.",
        )
    return value


def _check_fixed_size(width: int, height: int, checkpoint: Checkpoint) -> None:
    if checkpoint.rules.fixed_size and (width, height) not in checkpoint.sizes:
        learned = " or ".join(f"{w}x{h}" for w, h in checkpoint.sizes)
        raise UsageError(
            f'A size of {width}x{height} is not legal: "{checkpoint.name}" has learned {learned} only.',
            tip=f"use {' or '.join(f'--width {w} --height {h}' for w, h in checkpoint.sizes)}.",
        )


def _num_frames(request: GenerateRequest, fps: float, checkpoint: Checkpoint, notes: list[str]) -> int:
    rules = checkpoint.rules
    bounds = {"multiple": rules.frame_multiple, "offset": 1, "lowest": 1, "highest": rules.max_frames}
    if request.seconds is None:
        value = _given(request.num_frames, checkpoint.defaults.num_frames)
        legal = nearest_legal(value, **bounds)
        if value not in legal:
            raise UsageError(
                f"{value} frames are not legal: this model takes {rules.frame_multiple} k + 1 from 1 to "
                f"{rules.max_frames}.",
                tip=f"use {' or '.join(f'--frames {near}' for near in legal)}.",
            )
        return value
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
    value = min(nearest_legal(wanted, **bounds), key=lambda near: abs(near - wanted))
    if value != wanted:
        notes.append(
            f"{seconds:g} s at {fps:g} frames per second are {wanted:g} frames; rounded to {value}, the nearest legal "
            f"number ({value / fps:.4g} s)."
        )
    return value


def _seed(seed: int | None) -> int:
    if seed is None:
        return secrets.randbelow(2**32)
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"A seed of {seed} is not legal.", tip=f"choose from 0 to {MAX_SEED}.")
    return seed


def _steps(num_inference_steps: int) -> int:
    if not 1 <= num_inference_steps <= 1000:
        raise UsageError(f"{num_inference_steps} steps are not legal.", tip="choose --steps from 1 to 1000.")
    return num_inference_steps


def _guidance_scale(guidance_scale: float) -> float:
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise UsageError(
            f"A guidance scale of {guidance_scale:g} is not legal.",
            tip="choose 1 (no guidance) or more, often 3 to 7.",
        )
    return guidance_scale


def _guidance_scale_2(request: GenerateRequest, checkpoint: Checkpoint) -> float | None:
    if request.guidance_scale_2 is not None:
        if not checkpoint.can.two_transformers:
            raise UsageError(
                f'The model "{checkpoint.name}" has one transformer, and so one guidance scale.',
                tip="use --guidance-scale alone.",
            )
        return _guidance_scale(request.guidance_scale_2)
    # As in diffusers, one scale that is given is for both; the checkpoint's two go together.
    return checkpoint.defaults.guidance_scale_2 if request.guidance_scale is None else None


def _true_cfg_scale(guidance_scale: float | None, checkpoint: Checkpoint) -> float | None:
    if not checkpoint.can.embedded_guidance:
        if guidance_scale is None:
            return None
        raise UsageError(
            f'The guidance of the model "{checkpoint.name}" is classifier-free already.', tip="use --guidance-scale."
        )
    return _guidance_scale(_given(guidance_scale, 1.0))


def _check_images(request: GenerateRequest, checkpoint: Checkpoint) -> None:
    from vgen.conditioning.frames import open_image

    can = checkpoint.can
    if request.image is None:
        if can.needs_image:
            raise UsageError(
                f'The model "{checkpoint.name}" makes videos from a first image, and none is given.',
                tip="give one with --image.",
            )
        if request.last_image is not None:
            raise UsageError("There is a last image and no first one.", tip="give both: --image and --last-image.")
        return
    if not can.image_to_video:
        raise UsageError(
            f'The model "{checkpoint.name}" cannot start from an image: it was not trained to.',
            tip="leave the image out, or use a model that can: vgen models list tells which.",
        )
    if request.last_image is not None:
        if not can.last_image:
            raise UsageError(f'The model "{checkpoint.name}" cannot end with an image.', tip="leave out --last-image.")
        open_image(request.last_image)
    open_image(request.image)


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _json_safe(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _from_json(key: str, declared: str, value: Any) -> Any:
    """Check a JSON value against a field's declared type ("int | None") and convert where JSON has no such type."""
    expected = declared.removesuffix(" | None")
    if value is None and declared != expected:
        return None
    if expected == "Path" and isinstance(value, str | Path):
        return Path(value)
    if expected == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if expected == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if expected == "str" and isinstance(value, str):
        return value
    words = {"int": "a whole number", "float": "a number", "str": "text", "Path": "a path"}[expected]
    raise UsageError(f'The field "{key}" is {value!r}, but {words} is expected.')
