"""Clips → captions, by a small grammar with synonyms, word orders and left-out parts. No torch."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Literal

from vgen.toyland.scene import BARE_SHARE, Clip, Subject

Length = Literal["short", "medium", "long"]
LENGTHS: tuple[Length, ...] = ("short", "medium", "long")

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
COLOUR_WORDS = {
    "red": ("red", "red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink",),
    "white": ("white",),
}
SHAPE_WORDS = {
    "ball": ("ball", "ball", "sphere"),
    "cube": ("cube", "cube", "box", "block"),
    "cone": ("cone",),
    "cylinder": ("cylinder", "cylinder", "tube"),
    "ring": ("ring", "ring", "hoop"),
    "pyramid": ("pyramid",),
    "head": ("toy head", "doll head", "character", "toy person"),
}
# (what it does, doing it): "a ball jumps", "a ball jumping"
ACTION_WORDS = {
    "stays": (("stays still", "staying still"), ("stands still", "standing still"), ("rests", "resting")),
    "moves left": (
        ("moves left", "moving left"), ("moves to the left", "moving to the left"), ("slides left", "sliding left"),
    ),
    "moves right": (
        ("moves right", "moving right"), ("moves to the right", "moving to the right"),
        ("slides right", "sliding right"),
    ),
    "comes closer": (
        ("comes closer", "coming closer"), ("approaches", "approaching"),
        ("moves towards the camera", "moving towards the camera"),
    ),
    "goes away": (("goes away", "going away"), ("moves away", "moving away"), ("recedes", "receding")),
    "jumps": (
        ("jumps", "jumping"), ("bounces", "bouncing"), ("hops", "hopping"),
        ("jumps up and down", "jumping up and down"),
    ),
    "circles": (
        ("circles", "circling"), ("moves in a circle", "moving in a circle"),
        ("runs in circles", "running in circles"),
    ),
    "spins": (("spins", "spinning"), ("rotates", "rotating"), ("turns around", "turning around")),
    "rises": (("rises", "rising"), ("floats up", "floating up"), ("goes up", "going up"), ("flies up", "flying up")),
    "falls": (
        ("falls", "falling"), ("drops", "dropping"), ("falls down", "falling down"), ("comes down", "coming down"),
    ),
}  # fmt: skip
SCENE_WORDS = {
    "grass": ("on grass", "on the grass", "in a meadow", "on a green lawn", "in a field of grass"),
    "desert": ("in the desert", "in a desert", "on desert sand"),
    "snow": ("in the snow", "on snow", "in a snowy field", "in winter"),
    "night": ("at night", "in the dark night", "under the stars"),
    "beach": ("on the beach", "on a beach", "at the beach", "by the sea"),
}
BACKDROP_WORDS = {
    "grass": ("with trees in the background", "under a blue sky", "with trees and a blue sky"),
    "desert": ("with cacti in the background", "under a hazy sky", "with rocks and cacti"),
    "snow": ("with pine trees in the background", "under a pale sky", "with snowy trees"),
    "night": ("with lamps in the background", "under a dark sky", "with glowing lamps and stars"),
    "beach": ("with palm trees in the background", "under a blue sky", "with palm trees and the sea behind it"),
}
CAMERA_WORDS = {
    "static": ("static camera", "the camera is static", "the camera stands still", "fixed camera"),
    "pan left": ("the camera pans left", "camera panning left", "pan left", "camera pan to the left"),
    "pan right": ("the camera pans right", "camera panning right", "pan right", "camera pan to the right"),
    "tilt up": ("the camera tilts up", "camera tilting up", "tilt up"),
    "tilt down": ("the camera tilts down", "camera tilting down", "tilt down"),
    "dolly in": ("the camera dollies in", "dolly in", "the camera moves forward", "the camera zooms in"),
    "dolly out": ("the camera dollies out", "dolly out", "the camera moves back", "the camera zooms out"),
    "truck left": ("the camera trucks left", "camera trucking left", "truck left", "the camera slides left"),
    "truck right": ("the camera trucks right", "camera trucking right", "truck right", "the camera slides right"),
    "orbit left": ("the camera orbits left", "camera orbiting left", "orbit left", "the camera circles to the left"),
    "orbit right": (
        "the camera orbits right", "camera orbiting right", "orbit right", "the camera circles to the right",
    ),
    "roll": ("the camera rolls", "camera rolling", "camera roll"),
    "wander": ("handheld camera", "the camera wanders", "shaky handheld camera"),
}  # fmt: skip
OPENINGS = ("a video of", "a short clip of", "an animation of", "a toy world with")
GLUE = "a an and with hat hair wearing in the , . while as"


def caption(clip: Clip, rng: random.Random, length: Length = "medium") -> str:
    """Return a caption of `clip`: short ones leave parts out, long ones add the backdrop."""
    gerund = rng.random() < 0.5
    subjects = " and ".join(describe(subject, rng, gerund, brief=length == "short") for subject in clip.subjects)
    where = rng.choice(SCENE_WORDS[clip.scene])
    camera = rng.choice(CAMERA_WORDS[clip.camera])
    if length == "short":
        parts = [f"{subjects} {where}" if rng.random() < 0.85 else subjects]
        say_camera = clip.camera != "static" and rng.random() < 0.85
    else:
        parts = [f"{where}, {subjects}" if rng.random() < 0.2 else f"{subjects} {where}"]
        say_camera = rng.random() < (0.5 if clip.camera == "static" else 0.97)
    if length == "long":
        parts[0] = f"{rng.choice(OPENINGS)} {parts[0]}" if gerund and not parts[0].startswith(where) else parts[0]
        parts.append(rng.choice(BACKDROP_WORDS[clip.scene]))
    if say_camera:
        parts.insert(0 if rng.random() < 0.12 else len(parts), camera)
    return ", ".join(parts) + ("." if rng.random() < 0.2 else "")


def describe(subject: Subject, rng: random.Random, gerund: bool, brief: bool) -> str:
    """Return "a large red ball jumps" or "… jumping"; brief ones may leave out the size and a rest."""
    colour = rng.choice(COLOUR_WORDS[subject.colour])
    shape = rng.choice(SHAPE_WORDS[subject.shape])
    size = "" if brief and rng.random() < 0.7 else rng.choice(SIZE_WORDS[subject.size]) + " "
    if subject.shape == "head":
        worn = "hair" if subject.identity[9] < BARE_SHARE else "hat"
        worn = f"{article(colour)} {colour} hat" if worn == "hat" else f"{colour} hair"
        noun = f"{size}{shape} with {worn}"
    else:
        noun = f"{size}{colour} {shape}"
    does = [rng.choice(ACTION_WORDS[action])[gerund] for _, action in subject.actions]
    if subject.action == "stays" and rng.random() < (0.7 if brief else 0.3):
        does = does[1:]
    return f"{article(noun)} {noun} {' and then '.join(does)}".rstrip()


def article(noun: str) -> str:
    """Return "a" or "an"."""
    return "an" if noun[0] in "aeiou" else "a"


def words() -> list[str]:
    """Return every word that a caption can hold, sorted, punctuation included."""

    def texts(table: object) -> Iterator[str]:
        if isinstance(table, str):
            yield table
        elif isinstance(table, dict):
            yield from texts(tuple(table.values()))
        elif isinstance(table, tuple):
            for item in table:
                yield from texts(item)

    tables = (
        SIZE_WORDS, COLOUR_WORDS, SHAPE_WORDS, ACTION_WORDS, SCENE_WORDS, BACKDROP_WORDS, CAMERA_WORDS, OPENINGS,
        GLUE, "then",
    )  # fmt: skip
    return sorted({word for text in texts(tables) for word in re.findall(r"\w+|[^\w\s]", text)})
