"""Samplers: pure functions on `(velocity, latents, sigmas)` that know no model; importing them loads no torch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from vgen.sampling.dpmpp import dpmpp_2m
from vgen.sampling.euler import euler
from vgen.sampling.fireflow import fireflow
from vgen.sampling.flow import Sampler, Scheduler
from vgen.sampling.heun import heun
from vgen.sampling.lcm import lcm
from vgen.sampling.native import native
from vgen.sampling.rf_solver import rf_solver

if TYPE_CHECKING:
    from torch import Generator

SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "heun": heun,
    "dpm++": dpmpp_2m,
    "rf-solver": rf_solver,
    "fireflow": fireflow,
    "lcm": lcm,
    "native": native,
}


def bind(sampler: Sampler, scheduler: Callable[[], Scheduler], generator: Generator) -> Sampler:
    """Return a sampler with the checkpoint's scheduler or the shot's generator bound where it takes one; most do not.

    It takes one that has a parameter `scheduler` or `generator`.
    """
    parameters = inspect.signature(sampler).parameters
    if "scheduler" in parameters:
        return functools.partial(cast(Any, sampler), scheduler=scheduler())
    if "generator" in parameters:
        return functools.partial(cast(Any, sampler), generator=generator)
    return sampler
