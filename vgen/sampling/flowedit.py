"""FlowEdit: from data to edited data directly, without the noise between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vgen.sampling.flow import OnStep, Velocity

if TYPE_CHECKING:
    from torch import Tensor


def flowedit(
    source: Velocity,
    target: Velocity,
    data: Tensor,
    sigmas: Tensor,
    *,
    noise: Callable[[], Tensor],
    averages: int = 1,
    mask: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Return edited latents, moved by what the velocities to a target and from a source differ in.

    data [B, C, T, H, W]; sigmas [N + 1], falling to 0, beginning where the edit is to begin; `noise()` draws new noise
    of the data's shape, `averages` times per step. Where `mask` (from 0 to 1, broadcast to the data) is 0 nothing
    moves. Kulikov et al. 2024 (arXiv:2412.08629), algorithm 1 with n_min = 0.
    """
    num_steps = len(sigmas) - 1
    edited = data
    for i in range(num_steps):
        sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]

        def difference(edited: Tensor = edited, sigma: Tensor = sigma) -> Tensor:
            noisy = (1 - sigma) * data + sigma * noise()
            return target(edited + noisy - data, sigma) - source(noisy, sigma)

        mean: Tensor = sum((difference() for _ in range(averages - 1)), start=difference()) / averages
        edited = edited + dt * (mean if mask is None else mask * mean)
        if on_step is not None:
            on_step(i + 1, num_steps)
    return edited
