"""DPM-Solver++(2M) on a rectified flow: second order, one velocity per step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vgen.sampling.flow import OnStep, Velocity

if TYPE_CHECKING:
    from torch import Tensor


def dpmpp_2m(velocity: Velocity, latents: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """Return the latents at `sigmas[-1]`, extrapolating the predicted data from the last two steps.

    latents [B, C, T, H, W] at `sigmas[0]`; sigmas [N + 1], falling. Lu et al. 2022 (arXiv:2211.01095), algorithm 2,
    with alpha = 1 - sigma and lambda = log(alpha / sigma). The first step is first order, as there is no history, and
    so are the step after one from sigma 1 and the step to sigma 0, where lambda is infinite. No step looks further
    ahead than it looks back: flow schedules end in a jump of lambda that is many times the one before, and there the
    plain extrapolation does worse than Euler. The order stays two.
    """
    num_steps = len(sigmas) - 1
    previous: Tensor | None = None
    for i in range(num_steps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        data = latents - sigma * velocity(latents, sigma)
        extrapolated = data
        if previous is not None and sigmas[i - 1] < 1 and sigma_next > 0:
            h_last = _half_log_snr(sigma) - _half_log_snr(sigmas[i - 1])
            h = _half_log_snr(sigma_next) - _half_log_snr(sigma)
            extrapolated = data + (data - previous) * (h / h_last).clamp(max=1) / 2
        # sigma_next / sigma * x - alpha_next * (exp(-h) - 1) * D with exp(-h) written out, to hold at 0 and 1.
        ratio = sigma_next / sigma
        latents = ratio * latents + ((1 - sigma_next) - ratio * (1 - sigma)) * extrapolated
        previous = data
        if on_step is not None:
            on_step(i + 1, num_steps)
    return latents


def _half_log_snr(sigma: Tensor) -> Tensor:
    return ((1 - sigma) / sigma).log()
