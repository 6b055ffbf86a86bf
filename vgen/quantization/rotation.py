"""Rotations by Hadamard matrices: what is large in one channel becomes a little in all."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MOST = 256  # multiplications per value, small beside the thousands of the layer itself
# Plain dicts, which compiled code reads as they are.
_FACTORS: dict[int, tuple[int, int]] = {}
_INTEGERS: dict[int, Tensor] = {}
_MATRICES: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


@functools.cache
def hadamard(order: int) -> Tensor:
    """Return a matrix [order, order] of 1 and -1, int8, whose rows are orthogonal.

    Sylvester's for powers of two; Paley's first construction where order - 1 is a prime 3 modulo 4 (Paley 1933);
    products of both. Raises `ValueError` where these give none.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if _is_power_of_two(order):
        return torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), hadamard(order // 2))
    if _is_paley(order):
        return _paley(order)
    if order % 2 == 0:
        return torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), hadamard(order // 2))
    raise ValueError(f"no Hadamard matrix of order {order}")


def is_order(order: int) -> bool:
    """Return whether `hadamard` has a matrix of an order."""
    while order % 2 == 0 and not _is_paley(order):
        order //= 2
    return order == 1 or _is_paley(order)


def factors(size: int) -> tuple[int, int]:
    """Return the orders (a, b) of the two Hadamard matrices whose product rotates blocks of a * b among `size`.

    Of the pairs for one block of all, the one that multiplies least; where there is none, or it multiplies more than
    `MOST` times per value, blocks of the largest power of two that divides the size.
    """
    if size not in _FACTORS:
        pair = _least_pair(size)
        if pair is None or sum(pair) > MOST:
            pair = _least_pair(size & -size)
        assert pair is not None, "powers of two have a matrix"
        _INTEGERS.update({order: hadamard(order) for order in pair})
        _FACTORS[size] = pair
    return _FACTORS[size]


def rotate(x: Tensor) -> Tensor:
    """Return x [..., K] times a block-diagonal matrix of Hadamard matrices, not normalised: `norm` times as long.

    It is the product of two small matrices, of the orders that `factors` tells, for each block. Their outputs are left
    in the order in which the second has them, which is as good a Hadamard matrix as any.
    """
    a, b = factors(x.shape[-1])
    rows = x.reshape(-1, b) @ _matrix(b, x.dtype, x.device)
    if a > 1:
        rows = rows.view(-1, a, b).transpose(1, 2).reshape(-1, a) @ _matrix(a, x.dtype, x.device)
    return rows.view(x.shape)


def norm(size: int) -> float:
    """Return the factor by which `rotate` lengthens vectors of a size."""
    a, b = factors(size)
    return float((a * b) ** 0.5)


def signs(size: int, seed: int) -> Tensor:
    """Return random 1 and -1, float64 [size]: with them a rotation is another one for every layer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1


def _matrix(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    key = (order, dtype, device)
    if key not in _MATRICES:
        _MATRICES[key] = _INTEGERS[order].to(device=device, dtype=dtype)
    return _MATRICES[key]


def _least_pair(block: int) -> tuple[int, int] | None:
    pairs = [(a, block // a) for a in range(1, block + 1) if block % a == 0 and is_order(a) and is_order(block // a)]
    return min(pairs, key=sum, default=None)


def _is_power_of_two(order: int) -> bool:
    return order & (order - 1) == 0


@functools.cache
def _is_paley(order: int) -> bool:
    prime = order - 1
    return prime % 4 == 3 and all(prime % divisor for divisor in range(3, int(prime**0.5) + 1, 2))


def _paley(order: int) -> Tensor:
    """Return I + S, where S is skew and holds which differences are squares modulo the prime order - 1."""
    prime = order - 1
    is_square = torch.zeros(prime, dtype=torch.bool)
    is_square[torch.arange(1, prime) ** 2 % prime] = True
    differences = (torch.arange(prime)[None] - torch.arange(prime)[:, None]) % prime
    matrix = torch.ones(order, order, dtype=torch.int8)
    matrix[1:, 1:] = torch.where(is_square[differences], 1, -1).to(torch.int8)
    matrix[1:, 1:][differences == 0] = 1
    matrix[1:, 0] = -1
    return matrix
