"""Quantization: schemes, calibration and the exported format; importing it loads no torch."""

from __future__ import annotations

from collections.abc import Callable

from vgen import options
from vgen.quantization.scheme import LayerFormat, Scheme
from vgen.quantization.w4a8 import W4A8
from vgen.quantization.w4a8_mp import W4A8MP
from vgen.quantization.w4a16 import W4A16
from vgen.quantization.w8a8 import W8A8
from vgen.quantization.w8a16 import W8A16

__all__ = ["SCHEMES", "LayerFormat", "Scheme", "arithmetic", "parse"]

SCHEMES: dict[str, Callable[..., Scheme]] = {
    "w8a8": W8A8,
    "w4a8": W4A8,
    "w4a8-mp": W4A8MP,
    "w8a16": W8A16,
    "w4a16": W4A16,
}


def parse(text: str) -> Scheme:
    """Return the scheme that `name` or `name:key=value,...` names; raise `UsageError` for any other."""
    return options.parse(text, SCHEMES, what="scheme")()


def arithmetic(scheme: str, device: str) -> str:
    """Return how a scheme's products are computed on a device.

    "int8"; "simulated", int8 values in floating-point arithmetic, where the device has no exact products of them; or
    "float" for a scheme that leaves activations as they are.
    """
    from vgen.quantization import kernels

    found = parse(scheme)
    return kernels.name(device) if found.format(found.weight_bits).activation_bits == 8 else "float"
