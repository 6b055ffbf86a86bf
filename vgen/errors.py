"""Errors that people read: what was given, what was expected, and how to fix it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class VgenError(Exception):
    """A failure with a message for people; the command line prints it and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str, *, tip: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.tip = tip

    def __str__(self) -> str:
        return self.message if self.tip is None else f"{self.message}\nTip: {self.tip}"


class UsageError(VgenError):
    """The request itself is wrong: an unknown name, an illegal value, options that exclude each other."""

    exit_code = 2


class CheckpointError(VgenError):
    """A checkpoint is missing, damaged, or of a kind that vgen cannot run."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean "x"?` for the closest of `known`, or an empty string when none is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f' Did you mean "{by_lower[close[0]]}"?' if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason_of(error: BaseException) -> str:
    """Return what an error says; of the system's errors without their number and path."""
    return getattr(error, "strerror", None) or str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out: Python's, torch's on any device, C++'s or the system's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = "out of memory|can't allocate memory|cannot allocate memory|bad_alloc"
    return isinstance(error, RuntimeError | OSError) and re.search(said, str(error), re.IGNORECASE) is not None


def of_the_machine(error: BaseException) -> VgenError | None:
    """Return what to tell people where memory ran out or a file cannot be used; None where it may be our own bug."""
    if is_out_of_memory(error):
        return VgenError("The memory ran out.", tip="ask for fewer or smaller things at once.")
    if isinstance(error, OSError) and error.filename is not None:
        return VgenError(f"Cannot use {error.filename}: {reason_of(error)}.", tip="check the path.")
    return None
