"""The held-out prompts say what their clips show, evenly and without doubt."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from vgen.toyland import captions
from vgen.toyland.prompts import (
    ATTRIBUTES,
    HELD_OUT_PROMPT_SEED,
    HELD_OUT_PROMPTS,
    even_clips,
    held_out,
    truth,
    write_held_out,
)

WORDS = {
    "scene": captions.SCENE_WORDS,
    "colour": captions.COLOUR_WORDS,
    "shape": captions.SHAPE_WORDS,
    "size": captions.SIZE_WORDS,
    "action": captions.ACTION_WORDS,
    "camera": captions.CAMERA_WORDS,
}


def phrases(attribute: str, value: str) -> set[str]:
    words = WORDS[attribute][value]
    return {word if isinstance(word, str) else word[0] for word in words}


def test_the_file_is_what_its_seed_makes() -> None:
    prompts = held_out()
    assert len(prompts) == HELD_OUT_PROMPTS
    assert [prompt.clip for prompt in prompts] == list(islice(even_clips(HELD_OUT_PROMPT_SEED), HELD_OUT_PROMPTS))
    assert write_held_out().count("\n") == HELD_OUT_PROMPTS


def test_every_attribute_is_named_and_no_phrase_means_two_things() -> None:
    for prompt in held_out():
        for name, value in truth(prompt.clip).items():
            assert any(phrase in prompt.text for phrase in phrases(name, value)), (prompt.text, name)
    for name, values in ATTRIBUTES.items():
        meant = Counter(phrase for value in values for phrase in phrases(name, value))
        assert max(meant.values()) == 1, name


def test_any_beginning_of_the_list_covers_the_values_evenly() -> None:
    truths = [truth(prompt.clip) for prompt in held_out()]
    for count in (26, 130, 260):
        for name, values in ATTRIBUTES.items():
            seen = Counter(told[name] for told in truths[:count])
            assert set(seen) == set(values) and max(seen.values()) - min(seen.values()) <= 1
