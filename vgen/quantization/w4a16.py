"""W4A16: int4 weights for memory; activations and arithmetic stay as they are."""

from __future__ import annotations

from dataclasses import dataclass

from vgen.quantization.scheme import LayerFormat, check_group


@dataclass(frozen=True, kw_only=True)
class W4A16:
    """`group` inputs of a channel share a scale, or with 0 all; no calibration."""

    group: int = 64
    clip: bool = True

    name = "w4a16"
    weight_bits = 4
    average_bits = None
    alpha = 0.0
    compensate = False
    is_calibrated = False

    def __post_init__(self) -> None:
        check_group(self.group)

    def format(self, weight_bits: int) -> LayerFormat:
        """Return how a layer is stored."""
        return LayerFormat(weight_bits=weight_bits, activation_bits=16, group=self.group)
