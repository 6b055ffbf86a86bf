"""The toy head: which solids it is made of and how its face is painted, all from an identity vector.

The vector's numbers, each in [0, 1): 0 skin, 1 head width, 2 eye spacing, 3 eye size, 4 iris hue, 5 mouth width,
6 mouth curve, 7 hair hue, 8 hairline, 9 hat kind, 10 hat hue (the subject's colour), 11 pattern kind, 12 pattern hue,
13 nose size, 14 brow tilt, 15 brow thickness.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgen.toyland.scene import BARE_SHARE, COLOURS, RGB

Box = tuple[float, float, float]
SKIN_LIGHT, SKIN_DARK = (0.98, 0.84, 0.72), (0.42, 0.26, 0.17)
HAIR_HUES = ((0.12, 0.08, 0.06), (0.38, 0.20, 0.08), (0.85, 0.66, 0.25), (0.72, 0.28, 0.10), (0.70, 0.70, 0.72))


def mix(first: RGB, second: RGB, amount: float) -> RGB:
    """Return the colour `amount` of the way from `first` to `second`."""
    r, g, b = (one + (other - one) * amount for one, other in zip(first, second, strict=True))
    return r, g, b


def skin_colour(identity: tuple[float, ...]) -> RGB:
    """Return the skin's colour."""
    return mix(SKIN_LIGHT, SKIN_DARK, identity[0])


def hair_colour(identity: tuple[float, ...], colour: str) -> RGB:
    """Return the hair's colour: natural under a hat, the subject's own without one."""
    return COLOURS[colour] if identity[9] < BARE_SHARE else HAIR_HUES[int(identity[7] * len(HAIR_HUES))]


def head_parts(identity: tuple[float, ...], colour: str) -> list[tuple[str, Box, Box, RGB, str]]:
    """Return the parts (solid, half sizes, offset from the head's foot, colour, paint) of a head 2 units high."""
    wide = 0.74 + 0.2 * identity[1]
    skin, tint = skin_colour(identity), COLOURS[colour]
    nose = 0.09 + 0.09 * identity[13]
    parts: list[tuple[str, Box, Box, RGB, str]] = [
        ("ball", (wide, 0.86, 0.8), (0.0, 0.86, 0.0), skin, "face"),
        ("ball", (nose, nose, nose), (0.0, 0.76, 0.82), mix(skin, (0.9, 0.3, 0.2), 0.25), "plain"),
    ]
    hat = (identity[9] - BARE_SHARE) / (1 - BARE_SHARE)
    if hat < 0:
        return parts
    if hat < 0.34:  # a party hat
        return [*parts, ("cone", (0.55, 0.5, 0.55), (0.0, 1.88, 0.0), tint, "panels")]
    brim: tuple[str, Box, Box, RGB, str] = ("cylinder", (0.86, 0.06, 0.86), (0.0, 1.42, 0.0), tint, "plain")
    if hat < 0.67:  # a top hat
        return [*parts, brim, ("cylinder", (0.55, 0.4, 0.55), (0.0, 1.8, 0.0), tint, "plain")]
    return [*parts, brim, ("ball", (0.62, 0.52, 0.62), (0.0, 1.45, 0.0), tint, "plain")]  # a bowler


def paint_face(point: Tensor, skin: Tensor, hair: Tensor, identity: Tensor) -> Tensor:
    """Return the colour [3, M] of points [3, M] on the unit sphere of heads with `identity` [IDENTITY_SIZE, M].

    The face looks along +z. `skin` and `hair` are [3, M].
    """
    x, y, z = point
    front = z > 0
    white, dark = torch.full_like(skin, 0.97), torch.full_like(skin, 0.10)
    hues = torch.tensor(list(COLOURS.values()), device=point.device)

    def hue(value: Tensor) -> Tensor:
        return hues[(value * len(hues)).long().clamp(max=len(hues) - 1)].T

    colour = skin
    kind = identity[11]
    cheek = (x.abs() - 0.48).square() + (y + 0.22).square() < 0.024
    stripes = ((y * 9).floor() % 2 == 0) & (y < 0.0) & (x.abs() > 0.35)
    dots = ((x * 11).floor() + (y * 11).floor()) % 2 == 0
    freckles = dots & (x.abs() > 0.12) & (x.abs() < 0.6) & (y < 0.05) & (y > -0.25)
    marked = torch.where(kind < 0.33, cheek, torch.where(kind < 0.66, stripes, freckles)) & front
    colour = torch.where(marked, 0.5 * skin + 0.5 * hue(identity[12]), colour)

    spacing, size = 0.24 + 0.16 * identity[2], 0.12 + 0.08 * identity[3]
    eye = ((x.abs() - spacing).square() + (y - 0.12).square()).sqrt() / size
    colour = torch.where(front & (eye < 1), white, colour)
    colour = torch.where(front & (eye < 0.62), hue(identity[4]) * 0.7, colour)
    colour = torch.where(front & (eye < 0.34), dark, colour)

    brow_y = 0.20 + size + 0.35 * (identity[14] - 0.5) * (x.abs() - spacing)
    brow = ((y - brow_y).abs() < 0.025 + 0.04 * identity[15]) & ((x.abs() - spacing).abs() < size * 1.15)
    colour = torch.where(front & brow, hair * 0.8, colour)

    half, curve = 0.18 + 0.22 * identity[5], 1.6 * (identity[6] - 0.35)
    mouth = ((y + 0.45 - curve * (x * x - half * half * 0.5)).abs() < 0.055) & (x.abs() < half)
    colour = torch.where(front & mouth, torch.full_like(skin, 0.0) + skin.new_tensor([[0.62], [0.10], [0.12]]), colour)

    hairline = 0.42 + 0.3 * identity[8] - 1.1 * (identity[8] + 0.4) * (-z).clamp(min=0)
    fringe = 0.05 * torch.sin(14 * x)
    return torch.where(y > hairline + fringe, hair, colour)
