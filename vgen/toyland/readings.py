"""Readings that need no learning: colours by the scene's own palette, displacement by centroid, camera by homography.

They are coarser than the probes and say nothing where the picture is not clear; what they say checks the probes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vgen.metrics import fidelity
from vgen.toyland.renderer import FIELD_OF_VIEW
from vgen.toyland.scene import COLOURS, RGB
from vgen.toyland.scenery import LANDMARKS, SCENERY, SEA

Frames = Tensor | NDArray[np.uint8]

CLEARLY = 0.06  # how much nearer than the background a pixel must be to a subject's colour; of 1
FEWEST_PIXELS = 1 / 500  # of the picture: less than this is no subject
NEARBY = 0.2  # of the picture's height: how far from their middle the pixels of a subject lie
LEVELS, ITERATIONS = (32, 64), 12  # heights at which homographies are fitted, and Gauss–Newton steps at each
EDGE = 0.04  # differences of brightness beyond this count less and less: subjects, shadows, what comes into view


@dataclass(frozen=True, kw_only=True)
class CameraMotion:
    """How the camera turned from the first frame to the last, in degrees, and how much larger all became."""

    pan: float
    """Positive to the left."""
    tilt: float
    """Positive upwards."""
    roll: float
    """Positive where the picture turns clockwise."""
    zoom: float
    """Above 1 where the camera came closer; 1.1 is a tenth larger."""


def scene(frames: Frames) -> str:
    """Return the scene whose palette of ground, sky and landmarks explains the frames uint8 [F, H, W, 3] best."""
    pixels = as_pixels(frames)[:, ::4, ::4].reshape(-1, 3)
    misfit = {name: float(nearest(pixels, background(name)).clamp(max=0.3).mean()) for name in SCENERY}
    return min(misfit, key=lambda name: misfit[name])


def colour(frames: Frames) -> str | None:
    """Return the colour of the one solid in the frames uint8 [F, H, W, 3]; None where none stands out."""
    found = colour_map(frames)
    counts = torch.bincount(found[found >= 0], minlength=len(COLOURS))
    if int(counts.max()) < FEWEST_PIXELS * found.numel():
        return None
    return list(COLOURS)[int(counts.argmax())]


def centroids(frames: Frames, of: str) -> Tensor:
    """Return where pixels of a colour lie, float32 [F, 2]: (x, y) in pixels; NaN where a frame shows too few.

    The mean of those near their median, so that a landmark of the same colour does not pull.
    """
    found = colour_map(frames) == list(COLOURS).index(of)
    height, width = found.shape[1:]
    centres = torch.full((len(found), 2), torch.nan)
    for index, mask in enumerate(found):
        y, x = mask.nonzero().float().unbind(1)
        if len(x) >= FEWEST_PIXELS * height * width:
            near = (x - x.median()).square() + (y - y.median()).square() < (NEARBY * height) ** 2
            if near.any():
                centres[index] = torch.stack([x[near].mean(), y[near].mean()]) + 0.5
    return centres


def camera_motion(frames: Frames) -> CameraMotion:
    """Return how the camera turned and approached, by a homography from each frame uint8 [F, H, W, 3] to the next.

    Turns are exact for a camera that only turns; a camera that also moves is told as the nearest turn.
    """
    pixels = as_pixels(frames)
    total = torch.eye(3, dtype=torch.float64)
    for one, other in pairwise(pixels):
        total = homography(one, other) @ total
    left, _, right = torch.linalg.svd(total / torch.linalg.det(total).abs() ** (1 / 3))
    pan, tilt, roll = angles(left @ right)
    middle = total / total[2, 2]
    return CameraMotion(pan=pan, tilt=tilt, roll=roll, zoom=float(torch.linalg.det(middle[:2, :2]).abs().sqrt()))


def angles(rotation: Tensor) -> tuple[float, float, float]:
    """Return (pan, tilt, roll) in degrees, as in `CameraMotion`, of a rotation [3, 3] from the old axes to the new."""
    forward, down = rotation[2].tolist(), rotation[:, 1].tolist()
    pan = math.degrees(math.atan2(-forward[0], forward[2]))
    tilt = math.degrees(math.asin(max(-1.0, min(1.0, -forward[1]))))
    return pan, tilt, math.degrees(math.atan2(-down[0], down[1]))


def turn_of(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """Return (pan, tilt, roll) in degrees between two extrinsics [4, 4]: the truth that `camera_motion` estimates."""
    return angles(after[:3, :3] @ before[:3, :3].T)


def flicker(frames: Frames) -> float:
    """Return how much brightness jumps back and forth, in [0, 1], as `fidelity.flicker` does."""
    return fidelity.flicker(torch.tensor(frames) if isinstance(frames, np.ndarray) else frames)


def as_pixels(frames: Frames) -> Tensor:
    """Return frames uint8 [F, H, W, 3] as float32 in [0, 1]."""
    pixels = torch.tensor(frames) if isinstance(frames, np.ndarray) else frames
    return pixels.float() / 255


def colour_map(frames: Frames) -> Tensor:
    """Return the index in COLOURS of each pixel [F, H, W] that shows a subject's colour, and -1 for all others."""
    pixels = as_pixels(frames)
    name = scene(frames)
    flat = pixels.reshape(-1, 3)
    away = torch.stack([nearest(flat, lit(name, rgb)) for rgb in COLOURS.values()], 1)
    best, index = away.min(1)
    clear = best + CLEARLY < nearest(flat, background(name))
    return torch.where(clear, index, -1).view(pixels.shape[:3])


def nearest(pixels: Tensor, palette: Tensor) -> Tensor:
    """Return the distance [M] of each pixel [M, 3] to the nearest of a palette [N, 3]."""
    return torch.cdist(pixels, palette).amin(1)


def background(name: str) -> Tensor:
    """Return the colours [N, 3] that a scene has without subjects."""
    look = SCENERY[name]
    shares = torch.linspace(0, 1, 6)[:, None]

    def between(first: RGB | Tensor, second: RGB | Tensor) -> Tensor:
        return torch.lerp(torch.as_tensor(first), torch.as_tensor(second).expand(6, 3), shares)

    ground = between(*look.ground)
    sky = between(look.horizon, look.zenith)
    colours = [ground * shade for shade in (1.0, 0.8, 0.6, 0.42)]
    colours += [sky, *(between(tone, look.cloud) for tone in sky), *(between(tone, look.horizon) for tone in ground)]
    if look.sea:
        sea = between(*SEA)
        colours += [
            sea,
            *(between(tone, (1.0, 1.0, 1.0)) for tone in sea),
            *(between(tone, ground[3]) for tone in sea),
        ]
    if look.stars:
        colours += [between(tone, (1.0, 1.0, 1.0)) for tone in sky]
    for thing in dict.fromkeys(look.landmarks):
        colours += [lit(name, rgb, gloss=False) for _, _, _, rgb, _ in LANDMARKS[thing]]
    return torch.cat(colours)


def lit(name: str, rgb: RGB, gloss: bool = True) -> Tensor:
    """Return the colours [N, 3] that a surface takes in a scene's light, from shade to full sun."""
    look = SCENERY[name]
    facing = torch.linspace(0, 1, 4)[:, None, None]
    up = torch.linspace(-1, 1, 3)[None, :, None]
    light = look.ambient * (0.82 + 0.3 * up) + look.diffuse * facing * torch.tensor(look.sun)
    shaded = (torch.tensor(rgb) * light).view(-1, 3)
    both = [shaded, 0.78 * shaded, shaded + 0.1] if gloss else [shaded]
    return torch.cat(both).clamp(0, 1)


def homography(first: Tensor, second: Tensor) -> Tensor:
    """Return the matrix float64 [3, 3] that takes viewing rays of `first` [H, W, 3] to those of `second`.

    By minimising the difference of brightness with Gauss–Newton steps from coarse to fine (Lucas and Kanade, 1981),
    each pixel weighted by how well it fits already (Cauchy), so that what moves by itself is left out.
    """
    matrix = torch.eye(3, dtype=torch.float64)
    half = math.tan(math.radians(FIELD_OF_VIEW / 2))
    for height in LEVELS:
        width = max(8, round(height * first.shape[1] / first.shape[0]))
        one, other = (
            nn.functional.interpolate(picture.mean(2)[None, None], (height, width), mode="area")
            for picture in (first, second)
        )
        y, x = torch.meshgrid(
            (torch.arange(height) + 0.5) / height * 2 - 1, (torch.arange(width) + 0.5) / height * 2, indexing="ij"
        )
        rays = torch.stack([(x - width / height).flatten() * half, y.flatten() * half, torch.ones(height * width)])
        for _ in range(ITERATIONS):
            moved = matrix.float() @ rays
            at = moved[:2] / moved[2:].clamp(min=1e-3)
            grid = torch.stack([at[0] / half * height / width, at[1] / half], -1).view(1, height, width, 2)
            warped = nn.functional.grid_sample(other, grid, align_corners=False, padding_mode="border")
            inside = (grid.abs().amax(-1) < 1).flatten()
            # The gradient in units of rays: a step of one pixel is 2 * half / height.
            per_ray = height / (4 * half)
            padded = nn.functional.pad(warped, (1, 1, 1, 1), mode="replicate")
            across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]).flatten() * per_ray
            along = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]).flatten() * per_ray
            u, v, _ = rays
            # Of the warped picture with respect to a small change of the rays before the warp, columns as in `matrix`.
            inner = across * u + along * v
            jacobian = torch.stack(
                [across * u, across * v, across, along * u, along * v, along, -inner * u, -inner * v], 1
            ).double()
            off = (one - warped).flatten().double()
            weight = inside / (1 + (off / EDGE).square())
            normal = (jacobian * weight[:, None]).T @ jacobian
            step = torch.linalg.solve(
                normal + 1e-3 * normal.trace() / 8 * torch.eye(8, dtype=torch.float64),
                (jacobian * weight[:, None]).T @ off,
            )
            change = torch.cat([step, torch.zeros(1, dtype=torch.float64)]).view(3, 3)
            matrix = matrix @ (torch.eye(3, dtype=torch.float64) + change)
            matrix = matrix / matrix[2, 2]
    return matrix
