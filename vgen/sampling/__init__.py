"""Samplers: pure functions on `(velocity, latents, sigmas)` that know no model; importing them loads no torch."""

from __future__ import annotations

from vgen.sampling.dpmpp import dpmpp_2m
from vgen.sampling.euler import euler
from vgen.sampling.flow import Sampler
from vgen.sampling.heun import heun

SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "dpm++": dpmpp_2m}
