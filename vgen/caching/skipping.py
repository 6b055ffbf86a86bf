"""How much of a model's work a cache saves: counted where the work is done, below the cache's hooks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Of how many calls of the parts that a cache is about, such as "blocks", how many it has answered itself."""

    parts: str
    calls: int
    skipped: int

    @property
    def share(self) -> float:
        """The part that was skipped, from 0 to 1."""
        return self.skipped / self.calls if self.calls else 0.0

    def __add__(self, other: Skipped) -> Skipped:
        return Skipped(parts=self.parts, calls=self.calls + other.calls, skipped=self.skipped + other.skipped)


class Counter:
    """Counts how often a transformer runs, and how often its parts do; `remove` leaves it as it was."""

    def __init__(self, transformer: nn.Module, parts: Sequence[nn.Module]) -> None:
        self.passes = 0
        self.runs = 0
        self._parts = [(part, vars(part).get("forward")) for part in parts]
        self._handle = transformer.register_forward_pre_hook(self._count_pass)
        for part in parts:
            part.forward = self._counted(part.forward)

    @property
    def calls(self) -> int:
        """How often the parts would have run without a cache: each once in a pass."""
        return self.passes * len(self._parts)

    def remove(self) -> None:
        """Take the counter off again; what was put around it has to be gone."""
        self._handle.remove()
        for part, forward in self._parts:
            if forward is None:
                del part.forward
            else:
                part.forward = forward

    def _count_pass(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.passes += 1

    def _counted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*arguments: Any, **options: Any) -> Any:
            self.runs += 1
            return forward(*arguments, **options)

        return run
