"""RF-Solver: second order, two velocities per step; it runs backwards as well as forwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vgen.sampling.flow import OnStep, Velocity

if TYPE_CHECKING:
    from torch import Tensor


def rf_solver(velocity: Velocity, latents: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """Return the latents at `sigmas[-1]`, by the second-order Taylor step x + dt * v + dt^2 / 2 * dv/dsigma.

    latents [B, C, T, H, W] at `sigmas[0]`; sigmas [N + 1], falling to generate, rising to invert. The derivative is
    (v(x + dt / 2 * v, sigma + dt / 2) - v) / (dt / 2) (Wang et al. 2024, arXiv:2411.04746), with which the step is
    dt times the velocity in the middle: the midpoint rule, in which form it loses nothing to rounding.
    """
    num_steps = len(sigmas) - 1
    for i in range(num_steps):
        dt = sigmas[i + 1] - sigmas[i]
        middle = latents + dt / 2 * velocity(latents, sigmas[i])
        latents = latents + dt * velocity(middle, sigmas[i] + dt / 2)
        if on_step is not None:
            on_step(i + 1, num_steps)
    return latents
