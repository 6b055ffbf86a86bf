"""Heun's method: second order, two velocities per step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vgen.sampling.flow import OnStep, Velocity

if TYPE_CHECKING:
    from torch import Tensor


def heun(velocity: Velocity, latents: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """Return the latents at `sigmas[-1]`, averaging the velocities at both ends of each step.

    latents [B, C, T, H, W] at `sigmas[0]`; sigmas [N + 1]. A step that ends at sigma 0 is Euler's, as a model is not
    trained there (Karras et al. 2022, arXiv:2206.00364, algorithm 1).
    """
    num_steps = len(sigmas) - 1
    for i in range(num_steps):
        dt = sigmas[i + 1] - sigmas[i]
        d = velocity(latents, sigmas[i])
        ahead = latents + dt * d
        latents = ahead if sigmas[i + 1] == 0 else latents + dt * (d + velocity(ahead, sigmas[i + 1])) / 2
        if on_step is not None:
            on_step(i + 1, num_steps)
    return latents
