"""The checkpoint's own scheduler, stepped by the same loop, so that a family's stock defaults give stock's result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vgen.sampling.flow import OnStep, Scheduler, Velocity

if TYPE_CHECKING:
    from torch import Tensor


def native(
    velocity: Velocity,
    latents: Tensor,
    sigmas: Tensor,
    *,
    scheduler: Scheduler | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Return the latents at `sigmas[-1]`, each step made by `scheduler`: UniPC, CogVideoX's DPM, whichever it is.

    latents [B, C, T, H, W] at `sigmas[0]`; sigmas [N + 1] are those that the scheduler was set to. It may remember
    earlier steps and draw noise, so it serves one video.
    """
    assert scheduler is not None, "bound by sampling.bind"
    num_steps = len(sigmas) - 1
    for i in range(num_steps):
        latents = scheduler.step(i, velocity(latents, sigmas[i]), latents)
        if on_step is not None:
            on_step(i + 1, num_steps)
    return latents
