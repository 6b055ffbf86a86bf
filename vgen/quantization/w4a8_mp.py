"""W4A8-MP: W4A8 in which the layers that lose most have int8 weights.

After ViDiT-Q's metric-decoupled mixed precision (Zhao et al. 2024, arXiv:2406.02540). `vgen.quantization.precision`
chooses the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from vgen.errors import UsageError
from vgen.quantization.scheme import WEIGHT_BITS, LayerFormat, check_alpha, check_group


@dataclass(frozen=True, kw_only=True)
class W4A8MP:
    """As `W4A8`, balanced, with `bits` integer bits for a weight on the average of all quantized layers."""

    bits: float = 5.0
    group: int = 64
    alpha: float = 0.5
    clip: bool = True
    compensate: bool = True

    name = "w4a8-mp"
    weight_bits = 4
    is_calibrated = True

    def __post_init__(self) -> None:
        check_group(self.group)
        check_alpha(self.alpha)
        least, most = WEIGHT_BITS
        if not least <= self.bits <= most:
            raise UsageError(
                f"An average of {self.bits:g} bits is not possible.", tip=f"choose from {least} to {most}: bits=5."
            )

    @property
    def average_bits(self) -> float:
        """The bits of a weight over all layers."""
        return self.bits

    def format(self, weight_bits: int) -> LayerFormat:
        """Return how a layer is stored that has so many bits."""
        return LayerFormat(weight_bits=weight_bits, group=self.group if weight_bits == 4 else 0, balanced=True)
