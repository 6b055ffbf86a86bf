"""What the user asked for, and the plan that it becomes once a checkpoint's defaults and rules are applied."""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from vgen import attention, caching, loras, options, parallel, performance, runtime
from vgen.checkpoints import Checkpoint, Rules
from vgen.conditioning import given
from vgen.conditioning.images import open_image
from vgen.errors import UsageError
from vgen.performance import Settings
from vgen.sampling import SAMPLERS

MAX_SEED = 2**63 - 1
MAX_GPUS = 64  # of one machine
MIN_FPS, MAX_FPS = 0.001, 1000.0  # an .mp4 cannot have frames that are shown for a day
# How a model is told which frames are given: by a timestep of 0 at their tokens, or by their latents, noised anew at
# each step, which any model takes and few heed as well.
KNOWN_FRAMES = ("timesteps", "reinject")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One video as asked for; None means "as the checkpoint says".

    `width` and `height` are in pixels, `seconds` is an alternative to `num_frames`, `fps` is in frames per second,
    `sampler` is `name` or `name:key=value`, each `lora` as `vgen.loras.asked` reads it, and `image` and `last_image`
    are the paths of the first and the last frame. `interpolate` are images at frames, each `IMAGE@FRAME`. A `video`
    goes on for `extend` seconds, or is made anew where the image `mask` is white and in the frames `missing`, such as
    `5-12,20`. `known_frames` is how the model is told what is given, one of `KNOWN_FRAMES`. Frames are counted from 0.
    As in diffusers, `guidance_scale_2` is for the second of two transformers, and `true_cfg_scale` is classifier-free
    guidance for a model that takes `guidance_scale` as an input; there is such guidance in `guidance_interval` alone,
    as `read_interval` reads it. `attention` is how self-attention is made sparse, `name:key=value`; None leaves it to
    the model. `gpus` share the tokens of the video by `context_parallel`, a name of `parallel.METHODS` with its
    options.
    """

    prompt: str
    negative_prompt: str | None = None
    model: str = "toyland"
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    true_cfg_scale: float | None = None
    guidance_interval: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    seconds: float | None = None
    fps: float | None = None
    sampler: str | None = None
    lora: tuple[str, ...] | None = None
    image: Path | None = None
    last_image: Path | None = None
    interpolate: tuple[str, ...] | None = None
    video: Path | None = None
    extend: float | None = None
    mask: Path | None = None
    missing: str | None = None
    known_frames: str | None = None
    attention: str | None = None
    cache: str | None = None
    performance: str = "auto"
    offload: str = "auto"
    compile: bool | None = None
    device: str = "auto"
    dtype: str = "auto"
    gpus: int | None = None
    context_parallel: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the request as values that JSON can hold."""
        return {field.name: json_safe(getattr(self, field.name)) for field in fields(self)}

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
        return cls(**{key: from_json(key, known[key], value) for key, value in values.items()})


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
    defaults, rules = checkpoint.defaults, checkpoint.rules
    if not request.prompt.strip():
        raise UsageError("The prompt is empty.", tip='say what to show: vgen generate "a red ball bounces on grass".')
    fps = _given(request.fps, defaults.fps)
    if not MIN_FPS <= fps <= MAX_FPS:
        raise UsageError(
            f"{fps:g} frames per second cannot be written.", tip=f"choose from {MIN_FPS:g} to {MAX_FPS:g}."
        )
    notes: list[str] = []
    sampler = _given(request.sampler, defaults.sampler)
    options.parse(sampler, SAMPLERS, what="sampler")
    num_inference_steps = _steps(_given(request.num_inference_steps, defaults.num_inference_steps))
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
    known_frames = _check_given(request, checkpoint)
    width, height = _frame_size(request, checkpoint)
    width, height = _size("width", width, rules), _size("height", height, rules)
    _check_fixed_size(width, height, checkpoint)
    made = Plan(
        prompt=request.prompt,
        negative_prompt=_given(request.negative_prompt, defaults.negative_prompt),
        model=request.model,
        seed=_seed(request.seed),
        num_inference_steps=num_inference_steps,
        guidance_scale=_guidance_scale(_given(request.guidance_scale, defaults.guidance_scale)),
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
        known_frames=known_frames,
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


def nearest_legal(value: float, *, multiple: int, offset: int, lowest: int, highest: int) -> tuple[int, ...]:
    """Return the legal numbers (`multiple` * k + `offset`, within bounds) just under and over `value`, lower first.

    There is one only where `value` is legal itself or lies outside the bounds.
    """
    under = int((value - offset) // multiple) * multiple + offset
    over = -int((offset - value) // multiple) * multiple + offset
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
        value = _given(request.num_frames, _default_num_frames(request, fps, checkpoint))
        legal = nearest_legal(value, **bounds)
        if value not in legal:
            raise UsageError(
                f"{value} frames are not legal: this model takes {rules.frame_multiple} k + 1 from 1 to "
                f"{rules.max_frames}.",
                tip=f"use {' or '.join(f'--frames {near}' for near in legal)}.",
            )
        return value
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


def read_interval(text: str) -> tuple[float, float]:
    """Return LOW and HIGH of `LOW-HIGH`, sigmas from 0 to 1: there is guidance where LOW < sigma <= HIGH.

    Kynkäänniemi et al. 2024 (arXiv:2404.07724). Raises `UsageError`.
    """
    try:
        low, high = map(float, text.split("-"))
    except ValueError:
        low, high = math.nan, math.nan
    if not 0 <= low < high <= 1:
        raise UsageError(
            f'"{text}" is no interval of noise levels.',
            tip="give LOW-HIGH, from 0 (a clean video) to 1 (noise), such as 0.8-1; 0-1 is guidance everywhere.",
        )
    return low, high


def _true_cfg_scale(guidance_scale: float | None, checkpoint: Checkpoint) -> float | None:
    if not checkpoint.can.embedded_guidance:
        if guidance_scale is None:
            return None
        raise UsageError(
            f'The guidance of the model "{checkpoint.name}" is classifier-free already.', tip="use --guidance-scale."
        )
    return _guidance_scale(_given(guidance_scale, 1.0))


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
    return -(-(num_frames - 1) // rules.frame_multiple) * rules.frame_multiple + 1


def _check_given(request: GenerateRequest, checkpoint: Checkpoint) -> str | None:
    """Return how the model is told of given frames; None where none are, or it takes images by inputs of its own.

    Raises `UsageError` for options that do not go together, and for a model that cannot.
    """
    can = checkpoint.can
    if request.known_frames not in (None, *KNOWN_FRAMES):
        raise UsageError(
            f'There is no way "{request.known_frames}" to give frames.', tip=f"choose {' or '.join(KNOWN_FRAMES)}."
        )
    _check_video(request)
    images = [path for path in (request.image, request.last_image) if path is not None]
    known = [request.interpolate, request.video, *images]
    if can.needs_image:
        if request.interpolate or request.video or request.known_frames:
            raise UsageError(
                f'The model "{checkpoint.name}" makes videos from a first image, and takes no other frames.',
                tip="use --image alone, or a model with a timestep per token, such as toyland.",
            )
        if request.image is None:
            if request.last_image is not None:
                raise UsageError("There is a last image and no first one.", tip="give both: --image and --last-image.")
            raise UsageError(
                f'The model "{checkpoint.name}" makes videos from a first image, and none is given.',
                tip="give one with --image, or use a text-to-video model.",
            )
        if request.last_image is not None and not can.last_image:
            raise UsageError(f'The model "{checkpoint.name}" cannot end with an image.', tip="leave out --last-image.")
    elif not any(known):
        if request.known_frames is not None:
            raise UsageError(
                "--known-frames says how frames are given, and there are none.", tip="give some: --image, --video."
            )
        return None
    elif not can.known_frames and request.known_frames != "reinject":
        only_first = not (request.last_image or request.interpolate or request.video)
        if not (only_first and can.image_to_video):
            raise UsageError(
                f'The model "{checkpoint.name}" cannot {"start from an image" if only_first else "be given frames"}: '
                "it was not trained to.",
                tip="use a model that can, such as toyland (vgen models show tells what one can), or try "
                "--known-frames reinject.",
            )
    for path in images:
        open_image(path)
    takes_them = can.known_frames or request.known_frames == "reinject"
    return request.known_frames or "timesteps" if takes_them and not can.needs_image else None


def _check_video(request: GenerateRequest) -> None:
    """Raise `UsageError` unless a video, what is to become of it and the images go together."""
    uses = {"--extend": request.extend, "--mask": request.mask, "--missing": request.missing}
    asked = [option for option, value in uses.items() if value is not None]
    if request.video is None:
        if asked:
            raise UsageError(f"{asked[0]} is for a video, and there is none.", tip="give it with --video CLIP.")
        return
    if not asked:
        raise UsageError(
            "A video is given, and nothing to do with it.",
            tip="make it longer with --extend SECONDS, or complete it with --mask IMAGE or --missing FRAMES.",
        )
    if request.extend is not None and len(asked) > 1:
        raise UsageError(f"Both --extend and {asked[1]} are given.", tip="do one after the other.")
    if request.extend is not None and not (math.isfinite(request.extend) and request.extend > 0):
        raise UsageError(f"A video cannot go on for {request.extend:g} seconds.", tip="use --extend 2.")
    if request.image or request.last_image or request.interpolate:
        raise UsageError("Both a video and images are given.", tip="leave out the images, or --video.")


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


def json_safe(value: Any) -> Any:
    """Return a field's value as JSON can hold it."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def from_json(key: str, declared: str, value: Any) -> Any:
    """Return a JSON value as a field's declared type ("int | None") has it; raise `UsageError` for another type."""
    expected = declared.removesuffix(" | None")
    if value is None and declared != expected:
        return None
    if expected == "Path" and isinstance(value, str | Path):
        return Path(value)
    if expected == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        # JSON has whole numbers of any length.
        return value if isinstance(value, float) or abs(value) <= sys.float_info.max else math.inf
    if expected == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if expected == "str" and isinstance(value, str):
        return value
    if expected == "bool" and isinstance(value, bool):
        return value
    if expected.startswith("tuple") and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return tuple(value)
    words = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "Path": "a path"}
    words["tuple[str, ...]"] = "a list of texts"
    raise UsageError(f'The field "{key}" is {value!r}, but {words[expected]} is expected.')
