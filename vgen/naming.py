"""Names of output files."""

from __future__ import annotations

import re
import unicodedata
from datetime import datetime

MAX_SLUG_LENGTH = 60


def slug(prompt: str) -> str:
    """Return the ASCII words of `prompt` in lower case, joined by hyphens, at most 60 characters, or "video" for none.

    Accents are dropped (é becomes e); characters without an ASCII form, such as emoji, part words.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", prompt[:1000]) if not unicodedata.combining(c))
    words: list[str] = re.findall("[a-z0-9]+", plain.lower())
    if not words:
        return "video"
    name = words[0][:MAX_SLUG_LENGTH]
    for word in words[1:]:
        if len(name) + 1 + len(word) > MAX_SLUG_LENGTH:
            break
        name += f"-{word}"
    return name


def default_name(prompt: str, seed: int, when: datetime) -> str:
    """Return a file name that tells runs apart, such as `a-red-ball-7-20260102-030405.mp4`."""
    return f"{slug(prompt)}-{seed}-{when:%Y%m%d-%H%M%S}.mp4"
