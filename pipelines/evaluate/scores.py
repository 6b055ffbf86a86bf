"""From readings and pixels to numbers: shares of what is right, beside the floor, and decibels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from vgen.toyland.prompts import ATTRIBUTES

if TYPE_CHECKING:
    from vgen.toyland.probes import Readings
    from vgen.video import Frames

COLUMNS = (*ATTRIBUTES, "joint", "flicker")
READ_AT_ONCE = 16  # videos


class Reading(Protocol):
    """What is read of each attribute of one video, None where it is unreadable: the probes' or what was kept of it."""

    def __getitem__(self, attribute: str, /) -> str | None: ...


def read_all(videos: Sequence[Frames], fps: float) -> list[Readings]:
    """Return the probes' readings of videos."""
    from vgen.toyland import probes

    shipped = probes.load()
    groups = [videos[start : start + READ_AT_ONCE] for start in range(0, len(videos), READ_AT_ONCE)]
    return [reading for group in groups for reading in shipped.read(group, fps)]


def score(readings: Sequence[Reading], truths: Sequence[dict[str, str]]) -> dict[str, float]:
    """Return the share of videos in which each attribute is read and right, and all of them are (`joint`)."""
    pairs = list(zip(readings, truths, strict=True))
    shares = {name: share(reading[name] == told[name] for reading, told in pairs) for name in ATTRIBUTES}
    return {**shares, "joint": share(all_right(readings, truths))}


def all_right(readings: Sequence[Reading], truths: Sequence[dict[str, str]]) -> list[bool]:
    """Return for each video whether everything in it is read and right."""
    return [all(one[name] == told[name] for name in ATTRIBUTES) for one, told in zip(readings, truths, strict=True)]


def gained(after: Sequence[bool], before: Sequence[bool]) -> dict[str, Any]:
    """Return what is gained in the share of right videos, of the same prompts made in two ways.

    Its standard error is that of the videos on which the two disagree, smaller than that of either share.
    """
    change = [int(one) - int(two) for one, two in zip(after, before, strict=True)]
    return {
        "joint_gained": round(sum(change) / len(change), 4),
        "joint_gained_error": round(deviation(change), 4),
        "gained_and_lost": [change.count(1), change.count(-1)],
    }


def deviation(values: Sequence[float]) -> float:
    """Return the standard error of the mean of values; of shares it is the binomial one."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)


def floor(readings: Sequence[Reading], truths: Sequence[dict[str, str]]) -> dict[str, float]:
    """Return the score of the readings against every other prompt's truth: what a model gets that reads no prompt."""
    pairs = [(one, two) for one in range(len(truths)) for two in range(len(truths)) if one != two]
    return score([readings[one] for one, _ in pairs], [truths[two] for _, two in pairs])


def plain_score(videos: Sequence[Frames], truths: Sequence[dict[str, str]]) -> dict[str, float]:
    """Return the share of videos whose scene the palettes tell right, and of those with a solid, whose colour."""
    from vgen.toyland import readings

    solids = [(frames, told) for frames, told in zip(videos, truths, strict=True) if told["shape"] != "head"]
    return {
        "scene": share(readings.scene(frames) == told["scene"] for frames, told in zip(videos, truths, strict=True)),
        "colour": share(readings.colour(frames) == told["colour"] for frames, told in solids),
    }


def mean_flicker(videos: Sequence[Frames]) -> float:
    """Return the mean of `readings.flicker`."""
    from vgen.toyland import readings

    return round(sum(map(readings.flicker, videos)) / len(videos), 5)


def share(right: Iterable[bool]) -> float:
    """Return the share of true values; 0 of none."""
    values = list(right)
    return round(sum(values) / len(values), 4) if values else 0.0


def decibels(squared_error: float) -> float | None:
    """Return the PSNR of a mean squared error between levels of 0 to 255; None where there is no error."""
    return round(10 * math.log10(255**2 / squared_error), 2) if squared_error else None


def wrong(reading: Readings, told: dict[str, str]) -> str:
    """Return what is read otherwise than it is, for people."""
    said = [f"{name}: {reading[name] or 'unreadable'}" for name in ATTRIBUTES if reading[name] != told[name]]
    return "; ".join(said) or "all right"
