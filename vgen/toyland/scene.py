"""What a Toyland clip is made of: a scene, one or two subjects with their actions, a camera move. No torch.

A `Clip` is the whole truth about a video before it is rendered: the same clip always renders to the same frames.
Units are metres and seconds; x points right, y up, and z towards the camera's starting place.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

RGB = tuple[float, float, float]

SCENES = ("grass", "desert", "snow", "night", "beach")
SHAPES = ("ball", "cube", "cone", "cylinder", "ring", "pyramid")
COLOURS: dict[str, RGB] = {
    "red": (0.86, 0.13, 0.13),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.98, 0.86, 0.16),
    "green": (0.10, 0.58, 0.20),
    "blue": (0.12, 0.30, 0.86),
    "purple": (0.50, 0.18, 0.68),
    "pink": (0.98, 0.52, 0.72),
    "white": (0.95, 0.95, 0.95),
}
SIZES = {"small": 0.58, "large": 0.98}  # half the height of a solid
ACTIONS = (
    "stays", "moves left", "moves right", "comes closer", "goes away",
    "jumps", "circles", "spins", "rises", "falls",
)  # fmt: skip
CAMERAS = (
    "static", "pan left", "pan right", "tilt up", "tilt down", "dolly in", "dolly out",
    "truck left", "truck right", "orbit left", "orbit right", "roll", "wander",
)  # fmt: skip
IDENTITY_SIZE = 16  # numbers in [0, 1) that draw a face: see face.py for what each does
BARE_SHARE = 0.25  # of identities wear no hat


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A solid or a toy head, and what it does from which second on."""

    shape: str
    """One of SHAPES, or "head"."""
    colour: str
    """Of the solid; of a head's hat, or of its hair if it wears none."""
    size: Literal["small", "large"]
    actions: tuple[tuple[float, str], ...]
    """(start second, action), the first at 0: a script that may change the action half way."""
    place: tuple[float, float]
    """(x, z) at time 0, in metres."""
    heading: float
    """Rotation about the vertical axis at time 0, in radians."""
    identity: tuple[float, ...] = ()
    """A head's IDENTITY_SIZE numbers; empty for solids."""

    @property
    def action(self) -> str:
        """The first action."""
        return self.actions[0][1]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Everything that decides a clip's pixels, but for its length, size and frame rate."""

    scene: str
    subjects: tuple[Subject, ...]
    camera: str
    layout: int
    """Seed of what a caption does not name: landmarks, sun, texture, the camera's small offsets."""


def sample_clip(rng: random.Random) -> Clip:
    """Return a random clip: mostly one solid, sometimes a head or two subjects."""
    two = rng.random() < 0.12
    count = 2 if two else 1
    return Clip(
        scene=rng.choice(SCENES),
        subjects=tuple(sample_subject(rng, index, count) for index in range(count)),
        camera="static" if rng.random() < 0.25 else rng.choice(CAMERAS),
        layout=rng.getrandbits(31),
    )


def sample_subject(rng: random.Random, index: int = 0, count: int = 1) -> Subject:
    """Return a random subject; the `index`-th of `count`, which decides its place so that two do not collide."""
    head = rng.random() < 0.15
    action = "stays" if rng.random() < 0.1 else rng.choice(ACTIONS)
    identity = tuple(rng.random() for _ in range(IDENTITY_SIZE)) if head else ()
    return Subject(
        shape="head" if head else rng.choice(SHAPES),
        colour=list(COLOURS)[int(identity[10] * len(COLOURS))] if head else rng.choice(list(COLOURS)),
        size=rng.choice(("small", "large")),
        actions=((0.0, action),),
        place=start_place(rng, action, index, count),
        heading=rng.uniform(-0.5, 0.5) if head else rng.uniform(-0.6, 0.6),
        identity=identity,
    )


def start_place(rng: random.Random, action: str, index: int = 0, count: int = 1) -> tuple[float, float]:
    """Return (x, z) so that two seconds of `action` stay in view; a second subject keeps to its own lane."""
    x, z = rng.uniform(-0.6, 0.6), rng.uniform(-0.3, 0.3)
    if count == 2:
        x, z = (-1.25, 0.7) if index == 0 else (1.25, -0.9)
        x, z = x + rng.uniform(-0.2, 0.2), z + rng.uniform(-0.2, 0.2)
    shift = {
        "moves left": (1.1, 0.0),
        "moves right": (-1.1, 0.0),
        "comes closer": (0.0, -1.6),
        "goes away": (0.0, 1.1),
    }
    dx, dz = shift.get(action, (0.0, 0.0))
    return x + dx, z + dz


def sample_clips(seed: int) -> Iterator[Clip]:
    """Yield random clips without end, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield sample_clip(rng)
