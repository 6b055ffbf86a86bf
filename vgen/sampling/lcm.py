"""Few-step students: predict the data at each noise level, and noise it anew to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vgen.sampling.flow import OnStep, Velocity

if TYPE_CHECKING:
    from torch import Generator, Tensor


def lcm(
    velocity: Velocity,
    latents: Tensor,
    sigmas: Tensor,
    *,
    grid_shift: float = 0.0,
    generator: Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Return the latents at `sigmas[-1]`; new noise, from `generator` on the CPU, is drawn for each level but 0.

    latents [B, C, T, H, W] at `sigmas[0]`; sigmas [N + 1], falling. Multistep consistency sampling (Song et al. 2023,
    arXiv:2303.01469, algorithm 1; Luo et al. 2023, arXiv:2310.04378) on a flow. Students of distribution matching are
    sampled in this way, too: FastVideo's `DmdDenoisingStage` and, for Wan 2.1, LightX2V's `WanStepDistillScheduler`.

    With `grid_shift` s the noise is as strong as at the nearest of the levels s u / (1 + (s - 1) u), u = 0.001, ...,
    1, while the model is told the sigmas as they are: FastVideo's students know timesteps that are rounded from there.
    """
    assert generator is not None or len(sigmas) == 2, "bound by sampling.bind"
    import torch

    levels = _nearest_on_grid(sigmas, grid_shift) if grid_shift else sigmas
    num_steps = len(sigmas) - 1
    for i in range(num_steps):
        data = latents - levels[i] * velocity(latents, sigmas[i])
        latents = data
        if sigmas[i + 1] > 0:
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            latents = (1 - levels[i + 1]) * data + levels[i + 1] * noise
        if on_step is not None:
            on_step(i + 1, num_steps)
    return latents


def _nearest_on_grid(sigmas: Tensor, shift: float) -> Tensor:
    import torch

    from vgen.sampling.schedule import shifted

    grid = torch.cat([sigmas.new_zeros(1), shifted(torch.arange(1, 1001).to(sigmas) / 1000, shift)])
    return grid[(grid[None] - sigmas[:, None]).abs().argmin(dim=1)]
