"""What a scheme decides, and how one linear layer is stored and computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vgen.errors import UsageError

WEIGHT_BITS = (4, 8)


@dataclass(frozen=True, kw_only=True)
class LayerFormat:
    """How one linear layer is stored and computed.

    `group` is how many neighbouring inputs of a channel share a scale; 0: all of them. Activations of 16 bits are not
    quantized. A `balanced` layer has its inputs scaled and rotated first.
    """

    weight_bits: int
    activation_bits: int = 8
    group: int = 0
    balanced: bool = False

    def num_bytes(self, in_features: int, out_features: int) -> int:
        """Return what the layer takes without its bias: integers, scales, the groups' multipliers, the balancing."""
        integers = in_features * out_features * self.weight_bits // 8
        multipliers = out_features * (in_features // self.group) if self.group else 0
        return integers + 4 * out_features + multipliers + (4 * in_features if self.balanced else 0)

    def bits_per_weight(self, in_features: int, out_features: int) -> float:
        """Return the bits that one weight takes, with its share of everything else that is stored for it."""
        return 8 * self.num_bytes(in_features, out_features) / (in_features * out_features)


class Scheme(Protocol):
    """A way to quantize a model: a frozen dataclass whose fields are its options.

    `weight_bits` is what every layer has, or with `average_bits` the least. `alpha` is the balancing's; `clip` chooses
    scales by the error of the weights rather than by their maxima; `compensate` rounds by the error of the products.
    """

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def weight_bits(self) -> int:
        """The bits of a weight."""

    @property
    def average_bits(self) -> float | None:
        """The bits of a weight over all layers, where they differ."""

    @property
    def alpha(self) -> float:
        """How much of the balancing follows the activations."""

    @property
    def clip(self) -> bool:
        """Whether scales are searched."""

    @property
    def compensate(self) -> bool:
        """Whether later weights take up what earlier ones are off by."""

    @property
    def is_calibrated(self) -> bool:
        """Whether it needs to see activations."""

    def format(self, weight_bits: int) -> LayerFormat:
        """Return how a layer is stored that has so many bits."""


def check_group(group: int) -> None:
    """Raise `UsageError` unless a group's size is 0 or even and positive."""
    if group < 0 or group % 2:
        raise UsageError(f"A group of {group} weights is not possible.", tip="use group=64, or group=0 for none.")


def check_alpha(alpha: float) -> None:
    """Raise `UsageError` unless alpha is from 0 to 1."""
    if not 0 <= alpha <= 1:
        raise UsageError(f"An alpha of {alpha:g} is not legal.", tip="choose from 0 (weights) to 1 (activations).")
