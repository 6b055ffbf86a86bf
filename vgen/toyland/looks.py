"""What one can see of a toy head's identity, as numbers that are close where two heads look alike."""

from __future__ import annotations

import functools
import random

import torch
from torch import Tensor

from vgen.toyland.face import hair_colour, skin_colour
from vgen.toyland.prompts import identity_of
from vgen.toyland.scene import BARE_SHARE, COLOURS, RGB

LOOK_SIZE = 31
REFERENCE_HEADS = 4096


def raw_look(identity: tuple[float, ...], colour: str) -> list[float]:
    """Return LOOK_SIZE numbers: colours as RGB, kinds as one of several, measures as they are. See face.py."""
    hat = (identity[9] - BARE_SHARE) / (1 - BARE_SHARE)
    worn = 0 if hat < 0 else 1 if hat < 0.34 else 2 if hat < 0.67 else 3  # nothing, party hat, top hat, bowler
    marks = 0 if identity[11] < 0.33 else 1 if identity[11] < 0.66 else 2  # cheeks, stripes, freckles
    return [
        *skin_colour(identity),
        *hair_colour(identity, colour),
        *COLOURS[colour],
        *hue(identity[4]),
        *hue(identity[12]),
        *(float(worn == kind) for kind in range(4)),
        *(float(marks == kind) for kind in range(3)),
        *(identity[index] for index in (1, 2, 3, 5, 6, 8, 13, 14, 15)),
    ]


def hue(value: float) -> RGB:
    """Return the colour that a number in [0, 1) stands for in an identity."""
    return list(COLOURS.values())[int(value * len(COLOURS))]


def look(identity: tuple[float, ...], colour: str) -> Tensor:
    """Return what one sees of an identity, float32 [LOOK_SIZE]: over all heads each number has mean 0, deviation 1."""
    mean, deviation = look_statistics()
    return (torch.tensor(raw_look(identity, colour)) - mean) / deviation


@functools.cache
def look_statistics() -> tuple[Tensor, Tensor]:
    """Return the mean and the deviation [LOOK_SIZE] of `raw_look` over random heads, always the same."""
    rng = random.Random(0)
    colours = [rng.choice(list(COLOURS)) for _ in range(REFERENCE_HEADS)]
    heads = torch.tensor([raw_look(identity_of(colour, rng), colour) for colour in colours])
    return heads.mean(0), heads.std(0)
