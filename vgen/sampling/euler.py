"""Euler's method: first order, one velocity per step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vgen.sampling.flow import OnStep, Velocity

if TYPE_CHECKING:
    from torch import Tensor


def euler(velocity: Velocity, latents: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """Return the latents at `sigmas[-1]`, following the flow in straight steps.

    latents [B, C, T, H, W] at `sigmas[0]`; sigmas [N + 1], falling to generate, rising to invert. Bit-identical to
    diffusers' `FlowMatchEulerDiscreteScheduler.step`.
    """
    num_steps = len(sigmas) - 1
    for i in range(num_steps):
        d = velocity(latents, sigmas[i])
        latents = latents + (sigmas[i + 1] - sigmas[i]) * d
        if on_step is not None:
            on_step(i + 1, num_steps)
    return latents
