"""Sparse attention: patterns, which say what sees what, and kernels, which run them; importing it loads no torch."""

from __future__ import annotations

from vgen import options
from vgen.attention import kernels as kernels
from vgen.attention.adaspa import AdaSpa
from vgen.attention.dense import Dense
from vgen.attention.patterns import Pattern
from vgen.attention.radial import Radial
from vgen.attention.sliding_tile import SlidingTile
from vgen.attention.tile import Tile

PATTERNS: dict[str, type[Pattern]] = {
    "dense": Dense,
    "tile": Tile,
    "adaspa": AdaSpa,
    "sliding-tile": SlidingTile,
    "radial": Radial,
}


def parse(text: str) -> Pattern:
    """Return the pattern that `name:key=value,...` means, its options checked. Raises `UsageError`."""
    return options.parse(text, PATTERNS, what="attention")()
