import re
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgen.naming import MAX_SLUG_LENGTH, default_name, slug


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red ball bounces on the grass!", "a-red-ball-bounces-on-the-grass"),
        ("tabs\tand/slashes\\and..dots", "tabs-and-slashes-and-dots"),
        ("Café à Zürich", "cafe-a-zurich"),
        ("🦊 fox 🦊", "fox"),
        ("🦊", "video"),
        ("红色的球", "video"),
        ("", "video"),
        ("../../etc/passwd", "etc-passwd"),
        ("x" * 10_000, "x" * 60),
    ],
)
def test_slug_keeps_the_words(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_slug_ends_with_a_whole_word() -> None:
    assert slug("elephant " * 20) == "-".join(["elephant"] * 6)


@given(st.text(max_size=12_000) | st.text(alphabet="ab \t/\\.\0\n🦊é", max_size=200))
def test_every_slug_is_a_plain_file_name(prompt: str) -> None:
    name = slug(prompt)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert len(name) <= MAX_SLUG_LENGTH


def test_default_name_tells_prompt_seed_and_time() -> None:
    assert default_name("A red ball", 7, datetime(2026, 1, 2, 3, 4, 5)) == "a-red-ball-7-20260102-030405.mp4"
