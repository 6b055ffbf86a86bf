"""Products of int8 matrices, and int8 activations: the arithmetic of a quantized layer."""

from __future__ import annotations

import torch
from torch import Tensor

from vgen.quantization import cpu, weights
from vgen.quantization.balance import balance_inputs

# How many values are worked on at once: on a CPU what its caches hold, elsewhere what keeps the int32 products of a
# long video from filling the memory.
AT_ONCE = {"cpu": 2**19}
AT_ONCE_ELSEWHERE = 2**28
# Of the tokens: the smallest maximum that is not taken for zeros.
TINY = 1e-30
_EXACT: dict[str, bool] = {}  # by kind of device; a plain dict, which compiled code reads as it is


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [M, K] as int8 [M, K] and scales float32 [M, 1], of which each is its token's own.

    Symmetric, by the token's largest value: it depends on no other token. What is not finite becomes a scale that is
    not, and so a product that is not.
    """
    scale = x.abs().amax(-1, keepdim=True).float().clamp_(min=TINY).div_(127)
    # A copy in float32 that is changed in place: operations on two dtypes copy, too, and more often.
    return x.to(torch.float32, copy=True).mul_(1 / scale).round_().to(torch.int8), scale


def integer_product(tokens: Tensor, weight: Tensor) -> Tensor:
    """Return tokens int8 [M, K] times weight int8 [N, K], [M, N]: int32, or where it is simulated float32."""
    if not is_exact(tokens.device.type) or (tokens.is_cuda and (tokens.shape[1] % 8 or weight.shape[0] % 8)):
        return tokens.float() @ weight.float().T
    if tokens.is_cuda and len(tokens) <= 16:
        return torch._int_mm(torch.nn.functional.pad(tokens, (0, 0, 0, 17 - len(tokens))), weight.T)[: len(tokens)]
    return torch._int_mm(tokens, weight.T)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    multipliers: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    balancing: Tensor | None = None,
) -> Tensor:
    """Return x [..., K] quantized per token times a quantized weight [N, K], plus bias [N], in the dtype of x.

    The weight is int8 [N, K] or packed int4 [N, K / 2], times `multipliers` uint8 [N, G] of its groups, times `scale`
    float32 [N]. Inputs are balanced where there is a `balancing` [K]. The same bit by bit whichever kernel runs.
    """
    if not (is_exact(x.device.type) and cpu.takes(x.device.type, x.dtype)):
        return _by_torch(x, weights.products(weight, multipliers), scale, bias, balancing)
    inputs = x if balancing is None else _balanced(x, balancing)
    return cpu.integer_linear(inputs, weight, multipliers, scale, bias)


def _balanced(x: Tensor, balancing: Tensor) -> Tensor:
    """Return balanced inputs [..., K] on a CPU, made some tokens at a time, as much as its caches hold."""
    at_once = max(128, AT_ONCE["cpu"] // x.shape[-1])
    if torch.compiler.is_compiling() or x.numel() <= at_once * x.shape[-1]:
        return balance_inputs(x, balancing)
    rows, made = x.reshape(-1, x.shape[-1]), torch.empty_like(x, memory_format=torch.contiguous_format)
    for part, into in zip(torch.split(rows, at_once), torch.split(made.view(rows.shape), at_once), strict=True):
        into.copy_(balance_inputs(part, balancing))
    return made


def _by_torch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, balancing: Tensor | None) -> Tensor:
    """Return what `quantized_linear` does for a weight int8 [N, K], some tokens at a time.

    So what comes in between never leaves a CPU's cache.
    """
    tokens = x.reshape(-1, x.shape[-1])
    offset = torch.zeros_like(scale) if bias is None else bias.float()
    rows = max(128, AT_ONCE.get(x.device.type, AT_ONCE_ELSEWHERE) // max(weight.shape))
    made = tokens.new_empty((len(tokens), len(weight)))
    for start in range(0, len(tokens), rows):
        part = tokens[start : start + rows]
        quantized, token_scale = quantize_tokens(part if balancing is None else balance_inputs(part, balancing))
        products = integer_product(quantized, weight).to(torch.float32).mul_(token_scale)
        made[start : start + rows] = torch.addcmul(offset, products, scale, out=products)
    return made.view(*x.shape[:-1], len(weight))


def name(device: str) -> str:
    """Return how int8 products are computed on a device: "int8", or "simulated" where it has no exact ones."""
    return "int8" if is_exact(torch.device(device).type) else "simulated"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exact(device: str) -> bool:
    """Return whether torch multiplies int8 matrices exactly on a device, which is tried once.

    Where compiled code asks first, it is tried while that is compiled. On CPUs without instructions for it (VNNI) the
    sums of two products saturate.
    """
    if device not in _EXACT:
        _EXACT[device] = _try_products(device)
    return _EXACT[device]


def _try_products(device: str) -> bool:
    largest = torch.full((32, 64), 127, dtype=torch.int8, device=device)
    try:
        return bool((torch._int_mm(largest, largest.T) == 64 * 127**2).all())
    except (RuntimeError, NotImplementedError):
        return False
