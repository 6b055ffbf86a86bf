"""A linear layer whose weight is integers."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vgen.quantization import weights
from vgen.quantization.balance import balance_inputs, balance_weight, balancing
from vgen.quantization.kernels import quantized_linear
from vgen.quantization.rotation import factors
from vgen.quantization.scheme import LayerFormat


class QuantizedLinear(nn.Module):
    """Takes the place of `nn.Linear`: the same inputs and outputs, [..., K] to [..., N], in the inputs' dtype.

    Buffers: `weight` int8 [N, K], or of 4 bits packed uint8 [N, K / 2]; `scale` float32 [N]; with groups `multipliers`
    uint8 [N, G]; balanced `balancing` float32 [K]. The bias is that of the layer before.
    """

    scale: Tensor
    weight: Tensor

    def __init__(
        self, in_features: int, out_features: int, format: LayerFormat, *, bias: bool, device: str = "meta"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format

        def buffer(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

        if format.weight_bits == 4:
            buffer("weight", out_features, in_features // 2, dtype=torch.uint8)
        else:
            buffer("weight", out_features, in_features, dtype=torch.int8)
        buffer("scale", out_features)
        self.multipliers: Tensor | None
        self.balancing: Tensor | None
        self.register_buffer("multipliers", None)
        self.register_buffer("balancing", None)
        if format.group:
            buffer("multipliers", out_features, in_features // format.group, dtype=torch.uint8)
        if format.balanced:
            buffer("balancing", in_features)
            factors(in_features)  # known before compiled code asks
        self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        format: LayerFormat,
        *,
        name: str,
        act_max: Tensor | None = None,
        alpha: float = 0.5,
        clip: bool = False,
        inputs: Tensor | None = None,
    ) -> QuantizedLinear:
        """Return a layer quantized; `act_max` [K], its inputs' largest values, is for a balanced one.

        The `name` draws the signs of the rotation. Weights are rounded by `inputs` [T, K], if any.
        """
        made = cls(linear.in_features, linear.out_features, format, bias=linear.bias is not None)
        weight = linear.weight.detach()
        made.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        if format.balanced:
            assert act_max is not None, "schemes that balance are calibrated"
            seed = zlib.crc32(name.encode())
            factor = balancing(act_max.to(weight.device), weight, alpha=alpha, seed=seed)
            made.balancing = factor.float()
            weight = balance_weight(weight, factor.float())
        if inputs is not None:
            inputs = inputs.to(weight.device)
            inputs = inputs.float() if made.balancing is None else balance_inputs(inputs.float(), made.balancing)
        quantized = weights.quantize(weight, format.weight_bits, group=format.group, clip=clip, inputs=inputs)
        made.weight = weights.pack(quantized.integers) if format.weight_bits == 4 else quantized.integers
        made.scale, made.multipliers = quantized.scale, quantized.multipliers
        return made.train(linear.training)

    @classmethod
    def stored(cls, linear: nn.Linear, format: LayerFormat, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
        """Return a layer whose buffers are these, with the bias of the layer before, on its device."""
        made = cls(linear.in_features, linear.out_features, format, bias=linear.bias is not None)
        made.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        for name, tensor in tensors.items():
            setattr(made, name, tensor if made.bias is None else tensor.to(made.bias.device))
        return made.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N] of inputs [..., K]."""
        if self.format.activation_bits == 8:
            return quantized_linear(x, self.weight, self.multipliers, self.scale, self.bias, self.balancing)
        if self.balancing is not None:
            x = balance_inputs(x, self.balancing)
        weight = (self.products() * self.scale[:, None]).to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def products(self) -> Tensor:
        """Return the weight without its scale, int8 [N, K], unpacked for as long as it is used."""
        return weights.products(self.weight, self.multipliers)

    def num_bytes(self) -> int:
        """Return what its buffers take, without the bias."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        """Return what `print` shows of it."""
        return f"{self.in_features}, {self.out_features}, {self.format}"
