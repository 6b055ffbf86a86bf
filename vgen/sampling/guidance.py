"""Guidance: one velocity out of what a model says with and without the prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

from vgen.errors import UsageError
from vgen.sampling.flow import Velocity

if TYPE_CHECKING:
    from torch import Tensor

Text = TypeVar("Text")  # what the backbone makes of a prompt


def classifier_free(
    velocity: Callable[[Tensor, Tensor, Text], Tensor],
    text: Text,
    negative_text: Text | None,
    guidance_scale: float | Callable[[Tensor], float],
    branch: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Velocity:
    """Return the velocity u + s * (c - u) of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).

    `velocity(latents [B, C, T, H, W], sigma [], text)` is the model's. The branches run in turn, as diffusers' do: a
    batch of both would round otherwise. Without a negative text, and where the scale is 1 or less, the model runs with
    the prompt alone. A scale may be a function of sigma. Each pass of the model is made inside of `branch(name)`, with
    diffusers' names for their caches, "cond" and "uncond".
    """

    def conditioned(latents: Tensor, sigma: Tensor) -> Tensor:
        with branch("cond"):
            return velocity(latents, sigma, text)

    if negative_text is None or (not callable(guidance_scale) and guidance_scale <= 1):
        return conditioned

    def guided(latents: Tensor, sigma: Tensor) -> Tensor:
        scale = guidance_scale(sigma) if callable(guidance_scale) else guidance_scale
        conditional = conditioned(latents, sigma)
        if scale <= 1:
            return conditional
        with branch("uncond"):
            unconditional = velocity(latents, sigma, negative_text)
        return unconditional + scale * (conditional - unconditional)

    return guided


def read_interval(text: str) -> tuple[float, float]:
    """Return LOW and HIGH of `LOW-HIGH`, sigmas from 0 to 1: there is guidance where LOW < sigma <= HIGH.

    Kynkäänniemi et al. 2024 (arXiv:2404.07724). Raises `UsageError`.
    """
    try:
        low, high = map(float, text.split("-"))
    except ValueError:
        low, high = math.nan, math.nan
    if not 0 <= low < high <= 1:
        raise UsageError(
            f'"{text}" is no interval of noise levels.',
            tip="give LOW-HIGH, from 0 (a clean video) to 1 (noise), such as 0.8-1; 0-1 is guidance everywhere.",
        )
    return low, high
