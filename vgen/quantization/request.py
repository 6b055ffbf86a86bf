"""What is asked of a quantization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vgen.errors import UsageError, did_you_mean

STEPS = 10  # of a video that is made to calibrate
# What `--max-loss` may limit, what its numbers mean, and the most that they can be.
LIMITS = {
    "score": ("points of Toyland's joint score", 100.0),
    "psnr": ("dB at least", math.inf),
    "ssim": ("SSIM at least", 1.0),
}


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """What is asked for; `scheme` as `vgen.quantization.parse` reads it.

    `calibration` is a file of prompts (None: the built-in ones), of which `samples` videos of `steps` steps are made
    (None: `STEPS`, or what a few-step student has). `compare` videos are made before and after. Each `lora`, as
    `vgen.loras.asked` reads it, is merged before. `image` is the first frame for models that need one, and `max_loss`
    as `read_limits` reads it. With `stream` the weights stay on the disk, one in memory at a time; None: where they
    do not fit into it.
    """

    model: str
    scheme: str
    output: Path
    calibration: Path | None = None
    samples: int = 8
    steps: int | None = None
    compare: int = 4
    lora: tuple[str, ...] | None = None
    image: Path | None = None
    max_loss: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    stream: bool | None = None
    force: bool = False


def read_limits(text: str | None) -> dict[str, float]:
    """Return the limits of `score=2,psnr=30,ssim=0.9`; a number alone is of the score. Raises `UsageError`."""
    limits: dict[str, float] = {}
    for item in text.split(",") if text is not None else []:
        name, _, value = (part.strip() for part in (item if "=" in item else f"score={item}").partition("="))
        if name not in LIMITS:
            raise UsageError(
                f'There is no loss "{name}".{did_you_mean(name, LIMITS)}', tip=f"choose from {', '.join(LIMITS)}."
            )
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        meaning, most = LIMITS[name]
        if not (math.isfinite(limits[name]) and 0 <= limits[name] <= most):
            upper = f" to {most:g}" if math.isfinite(most) else ""
            raise UsageError(f'"{value}" is no limit for {name}.', tip=f"give a number from 0{upper}: {meaning}.")
    return limits
