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
