"""W8A16: int8 weights for memory; activations and arithmetic stay as they are."""

from __future__ import annotations

from dataclasses import dataclass

from vgen.quantization.scheme import LayerFormat


@dataclass(frozen=True, kw_only=True)
class W8A16:
    """A scale per output channel, and no calibration."""

    name = "w8a16"
    weight_bits = 8
    average_bits = None
    alpha = 0.0
    clip = False
    compensate = False
    is_calibrated = False

    def format(self, weight_bits: int) -> LayerFormat:
        """Return how a layer is stored."""
        return LayerFormat(weight_bits=weight_bits, activation_bits=16)
