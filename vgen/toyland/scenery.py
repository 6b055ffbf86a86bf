"""The five scenes: colours of ground and sky, light, and the landmarks that stand there."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.toyland.face import Box
from vgen.toyland.scene import RGB

Part = tuple[str, Box, Box, RGB, str]
"""(solid, half sizes, centre, colour, paint), in metres from the foot of the thing that it is a part of."""


@dataclass(frozen=True, kw_only=True)
class Scenery:
    """One scene's look. Colours are display RGB in [0, 1]."""

    ground: tuple[RGB, RGB]
    horizon: RGB
    zenith: RGB
    cloud: RGB
    sun: RGB
    ambient: float
    diffuse: float
    landmarks: tuple[str, ...]
    sea: bool = False
    stars: bool = False


SCENERY: dict[str, Scenery] = {
    "grass": Scenery(
        ground=((0.17, 0.42, 0.10), (0.44, 0.69, 0.22)), horizon=(0.80, 0.91, 0.98), zenith=(0.25, 0.55, 0.93),
        cloud=(1.0, 1.0, 1.0), sun=(1.0, 0.97, 0.85), ambient=0.62, diffuse=0.50,
        landmarks=("tree", "tree", "bush"),
    ),
    "desert": Scenery(
        ground=((0.72, 0.50, 0.26), (0.93, 0.76, 0.48)), horizon=(0.98, 0.90, 0.72), zenith=(0.55, 0.74, 0.90),
        cloud=(1.0, 0.95, 0.85), sun=(1.0, 0.92, 0.70), ambient=0.62, diffuse=0.50,
        landmarks=("cactus", "cactus", "rock"),
    ),
    "snow": Scenery(
        ground=((0.76, 0.83, 0.92), (0.97, 0.98, 1.00)), horizon=(0.88, 0.92, 0.97), zenith=(0.56, 0.68, 0.82),
        cloud=(0.96, 0.97, 1.0), sun=(1.0, 1.0, 0.97), ambient=0.64, diffuse=0.45,
        landmarks=("pine", "pine", "pine"),
    ),
    "night": Scenery(
        ground=((0.05, 0.07, 0.13), (0.16, 0.19, 0.30)), horizon=(0.16, 0.17, 0.36), zenith=(0.02, 0.02, 0.09),
        cloud=(0.12, 0.12, 0.24), sun=(0.95, 0.95, 0.85), ambient=0.52, diffuse=0.42,
        landmarks=("lamp", "lamp", "lamp"),
        stars=True,
    ),
    "beach": Scenery(
        ground=((0.86, 0.74, 0.50), (0.98, 0.91, 0.70)), horizon=(0.86, 0.95, 0.98), zenith=(0.22, 0.62, 0.92),
        cloud=(1.0, 1.0, 1.0), sun=(1.0, 0.97, 0.85), ambient=0.62, diffuse=0.50,
        landmarks=("palm", "palm", "parasol"),
        sea=True,
    ),
}  # fmt: skip
SEA = ((0.05, 0.42, 0.62), (0.35, 0.78, 0.86))
SHORE = -2.6  # metres: the sea begins behind this z

LANDMARKS: dict[str, list[Part]] = {
    "tree": [
        ("cylinder", (0.13, 0.50, 0.13), (0.0, 0.50, 0.0), (0.42, 0.27, 0.14), "plain"),
        ("ball", (0.72, 0.80, 0.72), (0.0, 1.60, 0.0), (0.13, 0.40, 0.12), "plain"),
    ],
    "bush": [("ball", (0.60, 0.42, 0.60), (0.0, 0.35, 0.0), (0.16, 0.45, 0.14), "plain")],
    "cactus": [
        ("cylinder", (0.20, 0.95, 0.20), (0.0, 0.95, 0.0), (0.20, 0.48, 0.22), "plain"),
        ("cylinder", (0.32, 0.11, 0.11), (0.36, 0.95, 0.0), (0.20, 0.48, 0.22), "plain"),
        ("cylinder", (0.12, 0.34, 0.12), (0.62, 1.22, 0.0), (0.20, 0.48, 0.22), "plain"),
    ],
    "rock": [("ball", (0.75, 0.42, 0.60), (0.0, 0.20, 0.0), (0.56, 0.40, 0.28), "plain")],
    "pine": [
        ("cone", (0.75, 0.70, 0.75), (0.0, 0.95, 0.0), (0.10, 0.34, 0.24), "plain"),
        ("cone", (0.55, 0.60, 0.55), (0.0, 1.75, 0.0), (0.86, 0.92, 0.97), "plain"),
    ],
    "lamp": [
        ("cylinder", (0.06, 1.00, 0.06), (0.0, 1.00, 0.0), (0.20, 0.20, 0.24), "plain"),
        ("ball", (0.26, 0.26, 0.26), (0.0, 2.20, 0.0), (1.00, 0.88, 0.50), "glow"),
    ],
    "palm": [
        ("cylinder", (0.11, 1.10, 0.11), (0.0, 1.10, 0.0), (0.52, 0.36, 0.20), "plain"),
        ("ball", (1.00, 0.26, 1.00), (0.0, 2.25, 0.0), (0.12, 0.50, 0.22), "plain"),
    ],
    "parasol": [
        ("cylinder", (0.05, 0.80, 0.05), (0.0, 0.80, 0.0), (0.90, 0.90, 0.88), "plain"),
        ("cone", (0.95, 0.28, 0.95), (0.0, 1.70, 0.0), (0.10, 0.66, 0.66), "plain"),
    ],
}
NUM_LANDMARKS = 6


def place_landmarks(scene: str, layout: int) -> list[tuple[str, float, float, float]]:
    """Return (landmark, x, z, scale) for a scene: a loose row behind the subjects, wider than any camera move."""
    rng = random.Random(layout ^ 0x5EED)
    placed = []
    for slot in range(NUM_LANDMARKS):
        x = -9.0 + 18.0 * (slot + rng.uniform(0.1, 0.9)) / NUM_LANDMARKS
        z = rng.uniform(-8.0, -3.2) + 0.25 * max(abs(x) - 3, 0)
        placed.append((rng.choice(SCENERY[scene].landmarks), x, z, rng.uniform(0.8, 1.25)))
    return placed


def sun_direction(layout: int) -> tuple[float, float, float]:
    """Return the unit vector towards the sun: from the side and a little from the front, so that shadows show."""
    rng = random.Random(layout ^ 0x50B)
    azimuth, elevation = rng.choice((-1, 1)) * rng.uniform(0.5, 1.1), rng.uniform(0.75, 1.0)
    return (
        math.sin(azimuth) * math.cos(elevation),
        math.sin(elevation),
        math.cos(azimuth) * math.cos(elevation),
    )


NOISE_SIZE = 256  # texels a side, tileable


@functools.cache
def noise_tile() -> Tensor:
    """Return a smooth tileable texture [NOISE_SIZE, NOISE_SIZE] with values in [0, 1], always the same."""
    generator = torch.Generator().manual_seed(7)
    tile = torch.zeros(NOISE_SIZE, NOISE_SIZE)
    for cells, weight in ((16, 1.0), (32, 0.8), (64, 0.6)):
        coarse = torch.rand(1, 1, cells, cells, generator=generator)
        coarse = torch.nn.functional.pad(coarse, (2, 2, 2, 2), mode="circular")
        scale = NOISE_SIZE // cells
        fine = torch.nn.functional.interpolate(coarse, scale_factor=scale, mode="bicubic", align_corners=False)
        tile += weight * fine[0, 0, 2 * scale : -2 * scale, 2 * scale : -2 * scale]
    low, high = tile.quantile(0.02), tile.quantile(0.98)
    return ((tile - low) / (high - low)).clamp(0, 1)


STARS_PER_RADIAN, STAR_RADIUS = 9.0, 0.011  # cells with a star each along an angle; radians


def stars(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Return the brightness in [0, 1] of a starry sky at angles of any shape: one star in each cell of a grid."""
    u, v = azimuth * STARS_PER_RADIAN, elevation * STARS_PER_RADIAN
    column, row = u.floor(), v.floor()
    across, up, bright = (torch.frac(torch.sin(column * a + row * b) * 43758.5).abs() for a, b in HASHES)
    away = ((u - column - 0.15 - 0.7 * across) ** 2 + (v - row - 0.15 - 0.7 * up) ** 2).sqrt() / STARS_PER_RADIAN
    return (2 - 1.6 * away / STAR_RADIUS).clamp(0, 1) * bright * (elevation > 0.02)


HASHES = ((12.9898, 78.233), (39.346, 11.135), (73.156, 52.235))  # two frequencies each, of a pseudo-random sine


def sample_noise(tile: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return the texture at (u, v), in texels and wrapping round, bilinear; any shape."""
    left, top = u.floor(), v.floor()
    a, b = u - left, v - top
    column, row = left.long() & (NOISE_SIZE - 1), top.long() & (NOISE_SIZE - 1)
    next_column, next_row = (column + 1) & (NOISE_SIZE - 1), (row + 1) & (NOISE_SIZE - 1)
    flat = tile.view(-1)
    upper = torch.lerp(flat[row * NOISE_SIZE + column], flat[row * NOISE_SIZE + next_column], a)
    lower = torch.lerp(flat[next_row * NOISE_SIZE + column], flat[next_row * NOISE_SIZE + next_column], a)
    return torch.lerp(upper, lower, b)
