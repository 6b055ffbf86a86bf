"""What the user asks of an edit or an inversion, and how that is written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgen.errors import UsageError
from vgen.request import from_json, to_json


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """An edit of one clip as asked for, or without a `target` an inversion; None means "as it is best for the clip".

    `method` is `name` or `name:key=value`; `strength` is the share of the schedule that is gone back, `inject` in how
    many steps V is carried over. `mask` is "none", "auto" or a path, with a `border` in pixels; `fit` is "pad" or
    "crop". `width`, `height`, `fps` and `num_frames` are what the model sees at once, with `overlap` frames shared by
    two windows; `start` and `seconds` are the part of the clip. `noise` is a file of `vgen invert`. `lora`,
    `guidance_scale_2`, `guidance_interval`, `attention`, `performance`, `offload`, `compile`, `gpus` and
    `context_parallel` are as for generating.
    """

    video: Path
    target: str | None = None
    source: str | None = None
    negative_prompt: str | None = None
    model: str | None = None
    lora: tuple[str, ...] | None = None
    seed: int | None = None
    method: str | None = None
    num_inference_steps: int | None = None
    strength: float | None = None
    inject: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    guidance_interval: str | None = None
    true_cfg_scale: float | None = None
    attention: str | None = None
    mask: str | None = None
    border: int | None = None
    fit: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    overlap: int | None = None
    fps: float | None = None
    start: float | None = None
    seconds: float | None = None
    noise: Path | None = None
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
    def from_dict(cls, values: Mapping[str, Any]) -> EditRequest:
        """Return the request that `to_dict` wrote.

        Raises `UsageError` for a field that is unknown, a value of another type, and without a clip.
        """
        read = from_json(cls, values)
        if "video" not in read:
            raise UsageError("The edit has no clip.", tip='name one: vgen edit clip.mp4 --target "...".')
        return cls(**read)
