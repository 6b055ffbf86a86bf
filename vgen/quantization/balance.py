"""Balancing: inputs are scaled and rotated, and weights the other way, so that their product stays the same.

x W^T = (x * b) H ((W / b) H)^T / h^2 for any b and a Hadamard matrix H that lengthens by h.
"""

from __future__ import annotations

from torch import Tensor

from vgen.quantization.rotation import norm, rotate, signs

LEAST = 1e-3  # of the largest maximum: what a channel that is nearly silent counts as


def balancing(act_max: Tensor, weight: Tensor, *, alpha: float, seed: int) -> Tensor:
    """Return what inputs are multiplied by, float64 [K]: signs / scales / the rotation's norm.

    The scales are s = act_max^alpha / w_max^(1 - alpha), act_max [K] and the weight [N, K] by their largest values per
    channel, with a geometric mean of 1. `seed` draws the signs.
    """
    act_max, w_max = act_max.double(), weight.abs().amax(0).double()
    act_max = act_max.clamp(min=max(LEAST * float(act_max.max()), 1e-30))
    w_max = w_max.clamp(min=max(LEAST * float(w_max.max()), 1e-30))
    log_scale = alpha * act_max.log() - (1 - alpha) * w_max.log()
    scale = (log_scale - log_scale.mean()).exp()
    size = weight.shape[1]
    return signs(size, seed).to(scale.device) / scale / norm(size)


def balance_inputs(x: Tensor, balancing: Tensor) -> Tensor:
    """Return inputs [..., K] in their own dtype, scaled and rotated."""
    return rotate((x * balancing).to(x.dtype))


def balance_weight(weight: Tensor, balancing: Tensor) -> Tensor:
    """Return the weight float64 [N, K] that gives balanced inputs the product that `weight` gives them before."""
    size = weight.shape[1]
    return rotate(weight.double() / balancing.double() / norm(size) ** 2)
