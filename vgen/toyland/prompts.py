"""Clips that cover every attribute evenly, prompts that name all of it, and the held-out list for scores.

Only clips with one subject: which of two subjects a reading is of would be a matter of taste.
"""

from __future__ import annotations

import importlib.resources
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, TypeVar

from vgen.toyland.captions import (
    ACTION_WORDS,
    CAMERA_WORDS,
    COLOUR_WORDS,
    SCENE_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    article,
)
from vgen.toyland.scene import (
    ACTIONS,
    BARE_SHARE,
    CAMERAS,
    COLOURS,
    IDENTITY_SIZE,
    SCENES,
    SHAPES,
    SIZES,
    Clip,
    Subject,
    start_place,
)

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "scene": SCENES,
    "colour": tuple(COLOURS),
    "shape": (*SHAPES, "head"),
    "size": tuple(SIZES),
    "action": ACTIONS,
    "camera": CAMERAS,
}
"""What a prompt says of a clip, and every value of it."""

HELD_OUT_PROMPTS, HELD_OUT_PROMPT_SEED = 260, 2_000_003
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and the clip that it describes."""

    text: str
    clip: Clip


def truth(clip: Clip) -> dict[str, str]:
    """Return the value of each of ATTRIBUTES; of the first subject where there are two."""
    subject = clip.subjects[0]
    return {
        "scene": clip.scene,
        "colour": subject.colour,
        "shape": subject.shape,
        "size": subject.size,
        "action": subject.action,
        "camera": clip.camera,
    }


def even_clips(seed: int) -> Iterator[Clip]:
    """Yield clips of one subject without end: any run of them has every value of every attribute about as often."""
    rng = random.Random(seed)
    scenes, colours, shapes, sizes, actions, cameras = (dealt(values, rng) for values in ATTRIBUTES.values())
    while True:
        action, shape, colour = next(actions), next(shapes), next(colours)
        head = shape == "head"
        subject = Subject(
            shape=shape,
            colour=colour,
            size="small" if next(sizes) == "small" else "large",
            actions=((0.0, action),),
            place=start_place(rng, action),
            heading=rng.uniform(-0.5, 0.5),
            identity=identity_of(colour, rng) if head else (),
        )
        yield Clip(scene=next(scenes), subjects=(subject,), camera=next(cameras), layout=rng.getrandbits(31))


def identity_of(colour: str, rng: random.Random) -> tuple[float, ...]:
    """Return a random identity whose hat, or hair, has `colour`."""
    numbers = [rng.random() for _ in range(IDENTITY_SIZE)]
    numbers[10] = (list(COLOURS).index(colour) + 0.5) / len(COLOURS)
    return tuple(numbers)


def dealt(values: Sequence[T], rng: random.Random) -> Iterator[T]:
    """Yield the values without end, all of them in a random order before any comes again."""
    while True:
        yield from rng.sample(values, len(values))


def full_caption(clip: Clip, rng: random.Random) -> str:
    """Return a caption that names every attribute, a static camera and a subject that stays as well."""
    subject = clip.subjects[0]
    colour, shape = rng.choice(COLOUR_WORDS[subject.colour]), rng.choice(SHAPE_WORDS[subject.shape])
    size = rng.choice(SIZE_WORDS[subject.size])
    if subject.shape == "head":
        bare = subject.identity[9] < BARE_SHARE
        noun = f"{size} {shape} with {f'{colour} hair' if bare else f'{article(colour)} {colour} hat'}"
    else:
        noun = f"{size} {colour} {shape}"
    does = rng.choice(ACTION_WORDS[subject.action])[0]
    where, camera = rng.choice(SCENE_WORDS[clip.scene]), rng.choice(CAMERA_WORDS[clip.camera])
    return f"{article(noun)} {noun} {does} {where}, {camera}"


def write_held_out() -> str:
    """Return the text of prompts.jsonl: a prompt and its clip on each line, from a seed that no training uses."""
    rng = random.Random(HELD_OUT_PROMPT_SEED)
    clips = islice(even_clips(HELD_OUT_PROMPT_SEED), HELD_OUT_PROMPTS)
    lines = [json.dumps({"prompt": full_caption(clip, rng), "clip": asdict(clip)}) for clip in clips]
    return "\n".join(lines) + "\n"


def held_out() -> list[Prompt]:
    """Return the held-out prompts; the first N of them, for any N, cover every attribute about evenly."""
    text = (importlib.resources.files("vgen") / "toyland" / "prompts.jsonl").read_text(encoding="utf-8")
    return [Prompt(text=line["prompt"], clip=as_clip(line["clip"])) for line in map(json.loads, text.splitlines())]


def as_clip(facts: dict[str, Any]) -> Clip:
    """Return the clip that `dataclasses.asdict` and JSON made `facts` of."""
    return Clip(**{**facts, "subjects": tuple(Subject(**frozen(subject)) for subject in facts["subjects"])})


def frozen(subject: dict[str, Any]) -> dict[str, Any]:
    """Return a subject's fields with tuples where JSON has lists."""
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in subject.items()}
    return {**own, "actions": tuple((start, action) for start, action in subject["actions"])}
