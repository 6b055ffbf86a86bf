"""W8A8: int8 weights with a scale per output channel, int8 activations with a scale per token."""

from __future__ import annotations

from dataclasses import dataclass

from vgen.quantization.scheme import LayerFormat


@dataclass(frozen=True, kw_only=True)
class W8A8:
    """Needs no calibration: activations are scaled as they come."""

    name = "w8a8"
    weight_bits = 8
    average_bits = None
    alpha = 0.0
    clip = False
    compensate = False
    is_calibrated = False

    def format(self, weight_bits: int) -> LayerFormat:
        """Return how a layer is stored."""
        return LayerFormat(weight_bits=weight_bits)
