"""What quantization costs each layer, and which layers of W4A8-MP get int8 weights.

After ViDiT-Q's metric-decoupled mixed precision (Zhao et al. 2024, arXiv:2406.02540): groups of layers are measured by
what they serve, and within a group layers by the error of their outputs. Groups get their share of the bits from the
first, layers their place in the group from the second, so that the two are never compared with each other. A layer's
weights are in memory once, so that its bits are the same at all noise levels; its error is the worst of any range.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vgen.quantization import layers
from vgen.quantization.calibration import RANGES, Call, Statistics
from vgen.quantization.layers import CROSS, FEED_FORWARD, SELF, Layer
from vgen.quantization.linear import QuantizedLinear
from vgen.quantization.scheme import WEIGHT_BITS, LayerFormat, Scheme

if TYPE_CHECKING:
    from vgen.backbones import Backbone


@dataclass(frozen=True, kw_only=True)
class GroupError:
    """How much of what a group serves is off, squared and relative: per range (NaN of nothing seen) and in all.

    In all it is the sum of the errors over the sum of what is served: a range in which little is, such as of the
    prompt's difference at the end, counts little.
    """

    per_range: list[float]
    in_all: float


SERVES = {
    SELF: "motion: the change from frame to frame of the velocity",
    CROSS: "the prompt: the difference that the text makes to the velocity",
    FEED_FORWARD: "the picture: the velocity itself",
}


def quantize_layer(
    layer: Layer, linear: nn.Linear, scheme: Scheme, format: LayerFormat, statistics: Statistics | None
) -> QuantizedLinear:
    """Return a layer quantized as a scheme says, in a format of it."""
    act_max = statistics.act_max(layer) if statistics is not None and format.balanced else None
    inputs = statistics.tokens_to_round_by(layer) if statistics is not None and scheme.compensate else None
    return QuantizedLinear.of(
        linear, format, name=layer.path, act_max=act_max, alpha=scheme.alpha, clip=scheme.clip, inputs=inputs
    )


def output_error(
    linear: nn.Linear, quantized: QuantizedLinear, tokens: Mapping[tuple[int, int], Tensor]
) -> list[float]:
    """Return what a quantized layer's outputs are off by, squared and relative to theirs, per range; NaN of no token.

    tokens [T, K] per range and branch.
    """
    errors = []
    for range_ in range(RANGES):
        seen = [part for (where, _), part in tokens.items() if where == range_]
        if not seen:
            errors.append(float("nan"))
            continue
        x = torch.cat(seen).to(quantized.scale.device)
        expected = linear(x).float()
        off = (quantized(x).float() - expected).square().sum()
        errors.append(float(off / expected.square().sum().clamp(min=1e-30)))
    return errors


def worst(errors: Iterable[float]) -> float:
    """Return the largest error of any range, leaving out those in which nothing was seen."""
    return max((error for error in errors if error == error), default=0.0)


def group_errors(
    backbone: Backbone, of: Sequence[Layer], scheme: Scheme, statistics: Statistics
) -> dict[str, GroupError]:
    """Return, per group, how much what the group serves is off with the group alone at the fewest bits."""
    expected = {key: _evaluate(backbone, call) for key, call in statistics.calls.items()}
    found = {}
    for role in dict.fromkeys(layer.role for layer in of):
        group = [layer for layer in of if layer.role == role]
        originals = {layer: layers.linear(backbone, layer) for layer in group}
        for layer, linear in originals.items():
            format = scheme.format(scheme.weight_bits)
            layers.replace(backbone, layer, quantize_layer(layer, linear, scheme, format, statistics))
        try:
            made = {key: _evaluate(backbone, call) for key, call in statistics.calls.items()}
        finally:
            for layer, linear in originals.items():
                layers.replace(backbone, layer, linear)
        sums = [_served(role, expected, made, range_) for range_ in range(RANGES)]
        off, served = (sum(part) for part in zip(*sums, strict=True))
        found[role] = GroupError(
            per_range=[one / whole if whole else float("nan") for one, whole in sums], in_all=off / max(served, 1e-30)
        )
    return found


def choose_bits(
    of: Sequence[Layer],
    average_bits: float,
    groups: Mapping[str, float],
    errors: Mapping[Layer, Mapping[int, float]],
) -> dict[Layer, int]:
    """Return the bits of each layer: as many at 8 as `average_bits` allows, the rest at 4.

    Each group may raise as many weights as its share says, which is proportional to its error in `groups` times its
    weights; what one cannot use goes to the others. In a group the layers are raised that gain most per weight by it,
    where `errors` has each layer's at 4 and at 8 bits.
    """
    least, most = WEIGHT_BITS
    total = sum(layer.num_weights for layer in of)
    allowed = total * (average_bits - least) / (most - least)
    bits = dict.fromkeys(of, least)
    waiting = {
        role: sorted(
            (layer for layer in of if layer.role == role),
            key=lambda layer: (errors[layer][least] - errors[layer][most]) / layer.num_weights,
            reverse=True,
        )
        for role in dict.fromkeys(layer.role for layer in of)
    }
    weights = {role: sum(layer.num_weights for layer in group) for role, group in waiting.items()}
    shares = {role: weights[role] * max(groups.get(role, 0.0), 1e-12) for role in waiting}
    budgets = {role: allowed * share / sum(shares.values()) for role, share in shares.items()}
    # First every group by its own share, then all by what is left, the neediest group first.
    spent = 0.0
    for role, group in waiting.items():
        left = min(budgets[role], allowed - spent)
        for layer in list(group):
            if layer.num_weights <= left:
                bits[layer] = most
                left -= layer.num_weights
                spent += layer.num_weights
                group.remove(layer)
    for role in sorted(waiting, key=lambda role: shares[role], reverse=True):
        for layer in waiting[role]:
            if layer.num_weights <= allowed - spent:
                bits[layer] = most
                spent += layer.num_weights
    return bits


def _evaluate(backbone: Backbone, call: Call) -> Tensor:
    with torch.inference_mode():
        return backbone.velocity(*call.arguments, **call.options).float().cpu()


def _served(
    role: str, expected: Mapping[tuple[int, int], Tensor], made: Mapping[tuple[int, int], Tensor], range_: int
) -> tuple[float, float]:
    """Return the squared error of what a group serves in a range, and the square of that; both 0 of nothing seen.

    Without an unconditional branch the text's difference is not known, and the velocity takes its place.
    """
    pairs = [(expected[key], made[key]) for key in sorted(expected) if key[0] == range_]
    if role == CROSS and len(pairs) == 2:
        (first, made_first), (second, made_second) = pairs
        pairs = [(first - second, made_first - made_second)]
    elif role == SELF:
        pairs = [(one.diff(dim=2), other.diff(dim=2)) if one.shape[2] > 1 else (one, other) for one, other in pairs]
    off = sum(float((other - one).square().sum()) for one, other in pairs)
    return off, sum(float(one.square().sum()) for one, _ in pairs)
