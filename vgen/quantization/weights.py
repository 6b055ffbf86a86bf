"""Weights to integers and back: symmetric, rounded to the nearest, with scales per channel and multipliers per group.

A weight is scale[n] * multiplier[n, g] * integer[n, k]. The multiplier of a group is a whole number, chosen so that
its product with an int4 is an int8: whatever the groups, a product with int8 activations is one of integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.quantization.rounding import compensated

LARGEST = {4: 7, 8: 127}  # of the integers, in both directions
MAX_MULTIPLIER = 18  # 7 * 18 = 126
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # shares of the largest weight that scales are tried for
TINY = 1e-12  # the scale of a channel of zeros


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A weight [N, K] as integers int8 [N, K], scale float32 [N] and, with groups, multipliers uint8 [N, G]."""

    integers: Tensor
    scale: Tensor
    multipliers: Tensor | None = None

    def products(self) -> Tensor:
        """Return the integers times their groups' multipliers, int8 [N, K]."""
        return grouped_products(self.integers, self.multipliers)

    def dequantized(self) -> Tensor:
        """Return the weight, float32 [N, K]."""
        return self.products().float() * self.scale[:, None]


def quantize(
    weight: Tensor, bits: int, *, group: int = 0, clip: bool = False, inputs: Tensor | None = None
) -> Quantized:
    """Return a weight [N, K] as integers of 4 or 8 bits, with a multiplier for each `group` of K (0: none).

    With `clip`, each scale or multiplier is the one of `CLIPS` that leaves the least squared error; without, that of
    the largest weight. With `inputs` [T, K] integers are those that keep products with them, not the nearest. `group`
    divides K.
    """
    weight = weight.float()
    largest = LARGEST[bits]
    most = weight.abs().amax(-1).clamp(min=TINY)
    if not group:
        scales = torch.stack([share * most / largest for share in (CLIPS if clip else CLIPS[:1])])
        scale = _best(weight[:, None], scales[..., None], largest)[:, 0]
        return Quantized(integers=_rounded(weight, scale[:, None], largest, inputs), scale=scale)
    scale = most / (largest * MAX_MULTIPLIER)
    groups = weight.reshape(len(weight), -1, group)
    needed = groups.abs().amax(-1) / (largest * scale[:, None])
    tried = torch.stack([(share * needed).ceil().clamp(1, MAX_MULTIPLIER) for share in (CLIPS if clip else CLIPS[:1])])
    multipliers = _best(groups, tried * scale[:, None], largest) / scale[:, None]
    multipliers = multipliers.round()
    steps = (multipliers * scale[:, None]).repeat_interleave(group, -1)
    integers = _rounded(weight, steps, largest, inputs)
    return Quantized(integers=integers, scale=scale, multipliers=multipliers.to(torch.uint8))


def pack(integers: Tensor) -> Tensor:
    """Return int4 integers, int8 [N, K] from -8 to 7, as uint8 [N, K / 2]: the second half of K in the high bits."""
    low, high = (integers + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def unpack(packed: Tensor) -> Tensor:
    """Return what `pack` was given."""
    integers = torch.empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=torch.int8, device=packed.device)
    low, high = integers.chunk(2, dim=-1)
    low.copy_(packed & 15).sub_(8)
    high.copy_(packed >> 4).sub_(8)
    return integers


def grouped_products(integers: Tensor, multipliers: Tensor | None) -> Tensor:
    """Return int8 [N, K], the integers times the multipliers uint8 [N, G] of their groups, if any."""
    if multipliers is None:
        return integers
    groups = integers.reshape(*multipliers.shape, -1)
    return (groups * multipliers[..., None].to(torch.int8)).reshape(integers.shape)


def products(weight: Tensor, multipliers: Tensor | None) -> Tensor:
    """Return a stored weight, int8 [N, K] or packed int4 [N, K / 2], times its groups' multipliers: int8 [N, K]."""
    return (int4_products if weight.dtype == torch.uint8 else grouped_products)(weight, multipliers)


def int4_products(packed: Tensor, multipliers: Tensor | None) -> Tensor:
    """Return int8 [N, K], what `pack` was given times the multipliers of its groups, if any.

    Compiled code calls it as it is: inductor makes loops of it that take fifty times as long on a CPU.
    """
    if torch.compiler.is_compiling():
        made: Tensor = torch.ops.vgen.int4_products(packed, multipliers)
        return made
    return grouped_products(unpack(packed), multipliers)


@torch.library.custom_op("vgen::int4_products", mutates_args=())
def _int4_products(packed: Tensor, multipliers: Tensor | None) -> Tensor:
    return grouped_products(unpack(packed), multipliers)


@_int4_products.register_fake
def _(packed: Tensor, multipliers: Tensor | None) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=torch.int8)


def _best(groups: Tensor, steps: Tensor, largest: int) -> Tensor:
    """Return the steps [N, G], of those tried [T, N, G], that leave groups [N, G, g] with the least squared error."""
    errors = torch.stack(
        [((_round(groups, step[..., None], largest) * step[..., None]) - groups).square().sum(-1) for step in steps]
    )
    return steps.gather(0, errors.argmin(0, keepdim=True))[0]


def _rounded(weight: Tensor, step: Tensor, largest: int, inputs: Tensor | None) -> Tensor:
    if inputs is None:
        return _round(weight, step, largest)
    return compensated(weight, step.expand_as(weight), largest, inputs)


def _round(weight: Tensor, step: Tensor, largest: int) -> Tensor:
    return (weight / step).round_().clamp_(-largest, largest).to(torch.int8)
