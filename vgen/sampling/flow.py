"""The types of a rectified flow x = (1 - sigma) * data + sigma * noise, whose velocity is dx/dsigma = noise - data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

# (latents [B, C, T, H, W], sigma []) -> dx/dsigma [B, C, T, H, W]
Velocity: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"

# Called after every step with the number of steps done and of all steps.
OnStep: TypeAlias = Callable[[int, int], None]


class Sampler(Protocol):
    """What a sampler is called with; it returns the latents at `sigmas[-1]`."""

    def __call__(
        self, velocity: Velocity, latents: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None
    ) -> Tensor: ...


class Scheduler(Protocol):
    """A checkpoint's own scheduler, its steps set: what it needs beyond a flow's velocity and latents it knows."""

    def step(self, i: int, velocity: Tensor, latents: Tensor) -> Tensor:
        """Return the latents after step i, for those before it and the velocity there."""
