"""W4A8: int4 weights, int8 activations, and inputs balanced so that four bits suffice.

After ViDiT-Q (Zhao et al. 2024, arXiv:2406.02540): inputs are divided by static scales and then rotated, and the
weights take both up before they are quantized, once.
"""

from __future__ import annotations

from dataclasses import dataclass

from vgen.quantization.scheme import LayerFormat, check_alpha, check_group


@dataclass(frozen=True, kw_only=True)
class W4A8:
    """`group` inputs of a channel share a scale, or with 0 all. Without `balance` weights are quantized as they are.

    With `compensate` they are rounded so that products with the calibration's inputs are near, one after the other.

    After the rotation the error of the weights is spread evenly over the inputs, and the error of a product is least
    where scaled inputs and scaled weights are equally large: at an `alpha` of 1/2.
    """

    group: int = 64
    alpha: float = 0.5
    balance: bool = True
    clip: bool = True
    compensate: bool = True

    name = "w4a8"
    weight_bits = 4
    average_bits = None

    def __post_init__(self) -> None:
        check_group(self.group)
        check_alpha(self.alpha)

    @property
    def is_calibrated(self) -> bool:
        """Whether it needs to see activations."""
        return self.balance or self.compensate

    def format(self, weight_bits: int) -> LayerFormat:
        """Return how a layer is stored."""
        return LayerFormat(weight_bits=weight_bits, group=self.group, balanced=self.balance)
