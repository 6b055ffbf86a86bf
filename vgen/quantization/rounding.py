"""Rounding that makes up for itself: what one weight is off by is taken up by those that are not yet rounded."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.1  # of the mean square of the inputs, added to each one's: for directions that were hardly seen
AT_ONCE = 128  # inputs, after which the errors of all of them go to the rest in one product


def compensated(weight: Tensor, step: Tensor, largest: int, inputs: Tensor) -> Tensor:
    """Return weights [N, K] in steps [N, K], int8 up to `largest`, so that their products with inputs [T, K] are near.

    Input by input, the error of each is taken off the later ones as far as `inputs` go together, so that the error of
    the products is least, and not that of the weights: GPTQ (Frantar et al. 2022, arXiv:2210.17323), by the inverse of
    the inputs' second moments and its Cholesky factor.
    """
    moments = inputs.float().T @ inputs.float() / len(inputs)
    moments.diagonal().add_(DAMPING * moments.diagonal().mean().clamp(min=1e-12))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    left, integers = weight.float().clone(), torch.empty_like(weight, dtype=torch.int8)
    for begin in range(0, weight.shape[1], AT_ONCE):
        end = min(begin + AT_ONCE, weight.shape[1])
        errors = left.new_empty(len(left), end - begin)
        for k in range(begin, end):
            rounded = (left[:, k] / step[:, k]).round_().clamp_(-largest, largest)
            integers[:, k] = rounded.to(torch.int8)
            error = errors[:, k - begin] = (left[:, k] - rounded * step[:, k]) / factor[k, k]
            left[:, k:end] -= torch.outer(error, factor[k, k:end])
        left[:, end:] -= errors @ factor[begin:end, end:]
    return integers
