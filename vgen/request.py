"""What the user asks of a video, and how that is written down."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vgen.errors import UsageError, did_you_mean


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
        return to_json(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerateRequest:
        """Return the request that `to_dict` of a request or of a plan wrote.

        Raises `UsageError` when the prompt is missing, a field is unknown or a value is of another type.
        """
        read = from_json(cls, values)
        if "prompt" not in read:
            raise UsageError("The request has no prompt.", tip='give it one: {"prompt": "..."}.')
        return cls(**read)


def json_safe(value: Any) -> Any:
    """Return a field's value as JSON can hold it."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def to_json(request: Any) -> dict[str, Any]:
    """Return the fields of a request, a dataclass, as JSON can hold them."""
    return {field.name: json_safe(getattr(request, field.name)) for field in fields(request)}


def from_json(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values from JSON as the fields of a dataclass have them.

    Raises `UsageError` for a field that is unknown and a value of another type.
    """
    known = {field.name: str(field.type) for field in fields(kind)}
    for key in values:
        if key not in known:
            raise UsageError(
                f'A request has no field "{key}".{did_you_mean(key, known)}',
                tip=f"its fields are: {', '.join(known)}.",
            )
    return {key: _as_declared(key, known[key], value) for key, value in values.items()}


def _as_declared(key: str, declared: str, value: Any) -> Any:
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
