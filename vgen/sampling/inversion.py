"""Inversion: a flow followed from data to noise on the grid, and by the method, that leads back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vgen.sampling.euler import euler
from vgen.sampling.fireflow import fireflow
from vgen.sampling.flow import OnStep, Sampler, Velocity
from vgen.sampling.rf_solver import rf_solver

if TYPE_CHECKING:
    from torch import Tensor

# Samplers whose steps may rise: without a history that a direction is built into.
SOLVERS: dict[str, Sampler] = {"euler": euler, "rf-solver": rf_solver, "fireflow": fireflow}


def invert(
    solver: Sampler, velocity: Velocity, data: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None
) -> Tensor:
    """Return the latents at `sigmas[0]` that `solver` leads to `data` from, up to its error.

    data [B, C, T, H, W]; sigmas [N + 1] as for generating, falling to 0.
    """
    return solver(velocity, data, sigmas.flip(0), on_step=on_step)


def last_steps(sigmas: Tensor, strength: float) -> Tensor:
    """Return the sigmas of the share `strength` of the steps that come last: [n + 1], n = floor(strength * N), not 0.

    As in diffusers' video-to-video pipelines: of 50 steps a strength of 0.8 leaves the last 40.
    """
    num_steps = len(sigmas) - 1
    return sigmas[num_steps - max(1, min(int(num_steps * strength), num_steps)) :]


def evaluations(solver: Sampler, sigmas: Tensor) -> list[list[float]]:
    """Return the sigmas at which `solver` asks for velocities, step by step, in order.

    Found by solving a flow of a single number that stands still; `sigmas` may fall or rise.
    """
    steps: list[list[float]] = [[]]

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        steps[-1].append(float(sigma))
        return latents

    solver(velocity, sigmas.new_zeros(1), sigmas, on_step=lambda step, num_steps: steps.append([]))
    return steps[:-1]
