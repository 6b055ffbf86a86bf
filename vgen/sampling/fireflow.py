"""FireFlow: second order at one velocity per step; it runs backwards as well as forwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vgen.sampling.flow import OnStep, Velocity

if TYPE_CHECKING:
    from torch import Tensor


def fireflow(velocity: Velocity, latents: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """Return the latents at `sigmas[-1]`, by midpoints that the velocity in the middle of the last step leads to.

    latents [B, C, T, H, W] at `sigmas[0]`; sigmas [N + 1], falling to generate, rising to invert. The midpoint rule
    needs the velocity at the beginning of a step to first order only, and that in the middle of the step before is
    one (Deng et al. 2024, arXiv:2412.07517). The first step has none before it: N + 1 velocities in all.
    """
    num_steps = len(sigmas) - 1
    d: Tensor | None = None
    for i in range(num_steps):
        dt = sigmas[i + 1] - sigmas[i]
        d = velocity(latents, sigmas[i]) if d is None else d
        d = velocity(latents + dt / 2 * d, sigmas[i] + dt / 2)
        latents = latents + dt * d
        if on_step is not None:
            on_step(i + 1, num_steps)
    return latents
