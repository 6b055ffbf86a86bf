from __future__ import annotations

from vgen.errors import CheckpointError, UsageError, VgenError, did_you_mean, first_line


def test_the_tip_follows_the_message() -> None:
    assert str(VgenError("It broke.")) == "It broke."
    assert str(VgenError("It broke.", tip="mend it.")) == "It broke.\nTip: mend it."


def test_exit_codes_tell_usage_from_failure() -> None:
    assert (VgenError.exit_code, UsageError.exit_code, CheckpointError.exit_code) == (1, 2, 1)


def test_did_you_mean_names_what_is_close_and_nothing_else() -> None:
    assert did_you_mean("Eular", ["euler", "heun"]) == ' Did you mean "euler"?'
    assert did_you_mean("xyz", ["euler", "heun"]) == ""
    assert did_you_mean("", []) == ""


def test_of_an_error_one_line_is_told_and_its_name_where_it_says_nothing() -> None:
    assert first_line(OSError("\nIt broke.\nHere is why.")) == "It broke."
    assert first_line(OSError("\n")) == first_line(OSError()) == "OSError"
