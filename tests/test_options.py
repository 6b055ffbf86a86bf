from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgen.errors import UsageError
from vgen.options import parse


@dataclass(frozen=True, kw_only=True)
class Blocks:
    sparsity: float = 0.5
    block: int = 64
    causal: bool = False
    kernel: str = "reference"


def scale(x: float, *, factor: float = 2.0) -> float:
    return x * factor


REGISTRY = {"blocks": Blocks}


def test_a_name_alone_takes_the_defaults() -> None:
    assert parse("blocks", REGISTRY, what="attention")() == Blocks()


def test_options_get_the_type_of_their_defaults() -> None:
    made = parse("blocks:sparsity=0.8, block=32,causal=true,kernel=flex", REGISTRY, what="attention")()
    assert made == Blocks(sparsity=0.8, block=32, causal=True, kernel="flex")


def test_functions_are_entries_too() -> None:
    assert parse("scale:factor=3", {"scale": scale}, what="function")(2.0) == 6.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block", 'There is no attention "block". Did you mean "blocks"?\nTip: choose one of: blocks.'),
        ("", 'There is no attention "".\nTip: choose one of: blocks.'),
        (
            "blocks:sparsty=0.8",
            'The attention "blocks" has no option "sparsty". Did you mean "sparsity"?\nTip: with its defaults it is '
            'written "blocks:sparsity=0.5,block=64,causal=false,kernel=reference".',
        ),
        (
            "blocks:block=many",
            'The option "block" of the attention "blocks" is "many", but a whole number is expected.',
        ),
        ("blocks:sparsity=nan", 'The option "sparsity" of the attention "blocks" is "nan", but a number is expected.'),
        ("blocks:sparsity=inf", 'The option "sparsity" of the attention "blocks" is "inf", but a number is expected.'),
        ("blocks:causal=1", 'The option "causal" of the attention "blocks" is "1", but true or false is expected.'),
        (
            "blocks:block=1,block=2",
            'The option "block" is given twice in "blocks:block=1,block=2".\nTip: give it once.',
        ),
    ],
)
def test_errors_say_what_was_given_and_expected(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, REGISTRY, what="attention")
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["blocks:", "blocks:block", "blocks:=3", "blocks:block=3,,"])
def test_what_is_no_list_of_pairs_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="options are key=value"):
        parse(text, REGISTRY, what="attention")


@given(st.text(max_size=40))
def test_any_text_parses_or_is_a_usage_error(text: str) -> None:
    try:
        made = parse(text, REGISTRY, what="attention")()
    except UsageError:
        return
    assert isinstance(made, Blocks)
