"""Samplers: pure functions on `(velocity, latents, sigmas)` that know no model; importing them loads no torch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

from vgen.sampling.dpmpp import dpmpp_2m
from vgen.sampling.euler import euler
from vgen.sampling.flow import Sampler, Scheduler
from vgen.sampling.heun import heun
from vgen.sampling.native import native

SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "dpm++": dpmpp_2m, "native": native}


def bind(sampler: Sampler, scheduler: Callable[[], Scheduler]) -> Sampler:
    """Return a sampler with the checkpoint's scheduler bound where it has a parameter `scheduler`; most have none."""
    if "scheduler" in inspect.signature(sampler).parameters:
        return functools.partial(cast(Any, sampler), scheduler=scheduler())
    return sampler
