"""The one grammar for methods with options: `name` or `name:key=value,key=value`."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from vgen.errors import UsageError, did_you_mean

T = TypeVar("T")

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def parse(text: str, registry: Mapping[str, Callable[..., T]], *, what: str) -> functools.partial[T]:
    """Return the entry of `registry` that `text` names, with its options bound.

    The options of an entry are its keyword-only parameters whose default is a bool, int, float or str; a frozen,
    keyword-only dataclass is therefore an entry too, and calling the result constructs (and validates) it. A parameter
    `global_` is the option `global`. `what` names the kind of thing in messages ("sampler"). Raises `UsageError` for
    an unknown name or option, an option given twice, and a value of another type.
    """
    name, separator, rest = text.strip().partition(":")
    if name not in registry:
        raise UsageError(
            f'There is no {what} "{name}".{did_you_mean(name, registry)}',
            tip=f"choose one of: {', '.join(registry)}.",
        )
    known = defaults(registry[name])
    keywords = {parameter.rstrip("_"): parameter for parameter in inspect.signature(registry[name]).parameters}
    values: dict[str, Any] = {}
    for item in rest.split(",") if separator else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not key or not equals:
            raise UsageError(
                f'Cannot read "{item}" in "{text}": options are key=value, separated by commas.',
                tip=_example(what, name, known),
            )
        if key not in known:
            raise UsageError(
                f'The {what} "{name}" has no option "{key}".{did_you_mean(key, known)}',
                tip=_example(what, name, known),
            )
        if key in values:
            raise UsageError(f'The option "{key}" is given twice in "{text}".', tip="give it once.")
        values[key] = _convert(value, type(known[key]), f'The option "{key}" of the {what} "{name}"')
    return functools.partial(registry[name], **{keywords[key]: value for key, value in values.items()})


def defaults(target: Callable[..., object]) -> dict[str, Any]:
    """Return the options of an entry of a registry, and their defaults."""
    parameters = inspect.signature(target).parameters.values()
    return {
        p.name.rstrip("_"): p.default for p in parameters if p.kind is p.KEYWORD_ONLY and type(p.default) in _EXPECTED
    }


def _example(what: str, name: str, defaults: Mapping[str, Any]) -> str:
    if not defaults:
        return f'it takes no options: write "{name}".'
    shown = ",".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in defaults.items())
    return f'with its defaults it is written "{name}:{shown}".'


def _convert(value: str, kind: type, where: str) -> bool | int | float | str:
    if kind is str:
        return value
    if kind is bool:
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
    else:
        with suppress(ValueError):
            number = int(value) if kind is int else float(value)
            if math.isfinite(number):
                return number
    raise UsageError(f'{where} is "{value}", but {_EXPECTED[kind]} is expected.')
