"""Numbers that a run takes: each is returned when it is legal, else refused with the nearest that are."""

from __future__ import annotations

import math

from vgen.checkpoints import Checkpoint, Rules
from vgen.errors import UsageError

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MIN_FPS, MAX_FPS = 0.001, 1000.0  # an .mp4 cannot have frames that are shown for a day


def nearest(value: float, *, multiple: int, offset: int, lowest: int, highest: int) -> tuple[int, ...]:
    """Return the legal numbers (`multiple` * k + `offset`, within bounds) just under and over `value`, lower first.

    There is one only where `value` is legal itself or lies outside the bounds.
    """
    under = int((value - offset) // multiple) * multiple + offset
    over = -int((offset - value) // multiple) * multiple + offset
    return tuple(sorted({min(max(near, lowest), highest) for near in (under, over)}))


def nearest_num_frames(value: float, rules: Rules) -> tuple[int, ...]:
    """Return the one or two frame counts that a model takes nearest to `value`, lower first."""
    return nearest(value, multiple=rules.frame_multiple, offset=1, lowest=1, highest=rules.max_frames)


def closest_num_frames(value: float, rules: Rules) -> int:
    """Return the frame count that a model takes nearest to `value`, of two as near the lower."""
    return min(nearest_num_frames(value, rules), key=lambda near: abs(near - value))


def num_frames(value: int, rules: Rules) -> int:
    """Return a number of frames. Raises `UsageError`."""
    legal = nearest_num_frames(value, rules)
    if value not in legal:
        raise UsageError(
            f"{value} frames are not legal: this model takes {rules.frame_multiple} k + 1 from 1 to "
            f"{rules.max_frames}.",
            tip=f"use {' or '.join(f'--frames {near}' for near in legal)}.",
        )
    return value


def side(name: str, value: int, rules: Rules) -> int:
    """Return a width or height, which its `name` tells, in pixels. Raises `UsageError`."""
    step = rules.size_multiple
    legal = nearest(value, multiple=step, offset=0, lowest=step, highest=rules.max_size)
    if value not in legal:
        raise UsageError(
            f"A {name} of {value} is not legal: this model takes multiples of {step} from {step} to {rules.max_size}.",
            tip=f"use {' or '.join(f'--{name} {near}' for near in legal)}.",
        )
    return value


def size(width: int, height: int, checkpoint: Checkpoint) -> tuple[int, int]:
    """Return (width, height) in pixels. Raises `UsageError`."""
    width, height = side("width", width, checkpoint.rules), side("height", height, checkpoint.rules)
    if checkpoint.rules.fixed_size and (width, height) not in checkpoint.sizes:
        learned = " or ".join(f"{w}x{h}" for w, h in checkpoint.sizes)
        raise UsageError(
            f'A size of {width}x{height} is not legal: "{checkpoint.name}" has learned {learned} only.',
            tip=f"use {' or '.join(f'--width {w} --height {h}' for w, h in checkpoint.sizes)}.",
        )
    return width, height


def fps(value: float) -> float:
    """Return frames per second. Raises `UsageError`."""
    if not MIN_FPS <= value <= MAX_FPS:
        raise UsageError(
            f"{value:g} frames per second cannot be written.", tip=f"choose from {MIN_FPS:g} to {MAX_FPS:g}."
        )
    return value


def seed(value: int) -> int:
    """Return a seed. Raises `UsageError`."""
    if not 0 <= value <= MAX_SEED:
        raise UsageError(f"A seed of {value} is not legal.", tip=f"choose from 0 to {MAX_SEED}.")
    return value


def num_inference_steps(value: int) -> int:
    """Return a number of denoising steps. Raises `UsageError`."""
    if not 1 <= value <= MAX_STEPS:
        raise UsageError(f"{value} steps are not legal.", tip=f"choose --steps from 1 to {MAX_STEPS}.")
    return value


def guidance_scale(value: float) -> float:
    """Return a scale of guidance. Raises `UsageError`."""
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(
            f"A guidance scale of {value:g} is not legal.", tip="choose 1 (no guidance) or more, often 3 to 7."
        )
    return value
