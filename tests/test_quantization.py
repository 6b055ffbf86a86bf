"""Integers, rotations and the layers made of them: what they promise, on numbers alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vgen.errors import UsageError
from vgen.quantization import SCHEMES, cpu, kernels, parse, rotation, rounding, weights
from vgen.quantization.balance import balance_weight, balancing
from vgen.quantization.linear import QuantizedLinear
from vgen.quantization.scheme import LayerFormat

FORMATS = [
    LayerFormat(weight_bits=8),
    LayerFormat(weight_bits=8, balanced=True),
    LayerFormat(weight_bits=4),
    LayerFormat(weight_bits=4, group=32),
    LayerFormat(weight_bits=4, group=32, balanced=True),
    LayerFormat(weight_bits=8, activation_bits=16),
    LayerFormat(weight_bits=4, activation_bits=16, group=32),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outliers(*shape: int) -> Tensor:
    """Return activations of which some channels are much larger, as those of transformers."""
    channels = torch.where(torch.arange(shape[-1]) % 16 == 3, 30.0, 1.0)
    return random(*shape, seed=1) * channels


def layer(in_features: int = 96, out_features: int = 64) -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(in_features, out_features)


def quantized(linear: nn.Linear, format: LayerFormat, x: Tensor, **options: Any) -> QuantizedLinear:
    act_max = x.abs().flatten(0, -2).amax(0)
    return QuantizedLinear.of(linear, format, name="blocks.0.ffn", act_max=act_max, **options)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 48, 80, 96, 108, 140, 256])
def test_rows_of_a_hadamard_matrix_are_orthogonal(order: int) -> None:
    matrix = rotation.hadamard(order).double()
    assert set(matrix.unique().tolist()) <= {1.0, -1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


# The widths of Wan, HunyuanVideo, CogVideoX, LTX and Toyland; then one that has no matrix of its own.
@pytest.mark.parametrize(
    ("size", "block"),
    [(1536, 1536), (8960, 8960), (5120, 5120), (13824, 13824), (3072, 3072), (12288, 12288), (1024, 1024), (368, 16)],
)
def test_rotations_keep_lengths_and_reach_every_channel_of_a_block(size: int, block: int) -> None:
    one = torch.zeros(2, size, dtype=torch.float64)
    one[0, 0] = one[1, -1] = 1
    rotated = rotation.rotate(one)
    assert rotated.norm(dim=-1).tolist() == pytest.approx([rotation.norm(size)] * 2)
    assert (rotated != 0).sum(-1).tolist() == [block, block]
    assert rotation.norm(size) == pytest.approx(block**0.5)


@pytest.mark.parametrize("alpha", [0.0, 0.12, 0.5, 1.0])
@pytest.mark.parametrize("size", [96, 368, 1536])
def test_balancing_changes_no_product_before_rounding(size: int, alpha: float) -> None:
    x, weight = outliers(40, size), random(24, size, seed=3)
    x[:, 5] = 0
    factor = balancing(x.abs().amax(0), weight, alpha=alpha, seed=7)
    expected = x @ weight.T
    found = rotation.rotate(x * factor) @ balance_weight(weight, factor).T
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    # It is no identity: the large channels are gone.
    balanced = rotation.rotate(x * factor)
    assert balanced.abs().max() / balanced.std() < 0.7 * x.abs().max() / x.std()


def test_balancing_halves_what_four_bits_lose() -> None:
    x, linear = outliers(200, 96), layer().double()
    expected = linear(x).detach()

    def loss(**options: Any) -> float:
        made = quantized(linear, LayerFormat(weight_bits=4, **options), x)
        return float((made(x) - expected).square().mean() / expected.square().mean())

    assert loss(balanced=True) < loss() / 2
    assert loss(group=32) < loss()


@given(rows=st.integers(1, 5), columns=st.integers(1, 40).map(lambda half: 2 * half), seed=st.integers(0, 2**31 - 1))
def test_packing_and_unpacking_changes_nothing(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    packed = weights.pack(integers)
    assert packed.nbytes * 2 == integers.nbytes
    assert torch.equal(weights.unpack(packed), integers)


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (4, 32)])
def test_a_weight_is_off_by_half_a_step_at_most(bits: int, group: int) -> None:
    weight = random(16, 96).float()
    weight[0] = 0
    made = weights.quantize(weight, bits, group=group)
    step = made.scale[:, None].expand_as(weight)
    if made.multipliers is not None:
        step = step * made.multipliers.repeat_interleave(group, 1)
        assert made.multipliers.min() >= 1 and made.multipliers.max() == weights.MAX_MULTIPLIER
    assert ((made.dequantized() - weight).abs() <= step / 2 + 1e-7).all()
    assert made.integers.abs().max() == weights.LARGEST[bits]
    assert made.products().abs().max() <= 127


@pytest.mark.parametrize("group", [0, 32])
def test_searched_scales_lose_less(group: int) -> None:
    weight = random(64, 96).float()
    losses = [
        (weights.quantize(weight, 4, group=group, clip=clip).dequantized() - weight).square().mean()
        for clip in (True, False)
    ]
    assert losses[0] < 0.95 * losses[1]


@pytest.mark.parametrize("group", [0, 32])
def test_rounding_that_compensates_keeps_products(group: int) -> None:
    weight = random(64, 256).float()
    mixing = random(24, 256, seed=3).float()  # inputs that go together, and a little of each one's own
    inputs, others = (random(500, 24, seed=seed).float() @ mixing + random(500, 256, seed=seed) for seed in (4, 5))

    def lost(made: weights.Quantized) -> float:
        return float(((made.dequantized() - weight) @ others.float().T).square().mean())

    nearest = weights.quantize(weight, 4, group=group, clip=True)
    made = weights.quantize(weight, 4, group=group, clip=True, inputs=inputs.float())
    assert torch.equal(made.scale, nearest.scale) and made.integers.abs().max() == 7
    assert lost(made) < lost(nearest) / 5


def test_rounding_compensates_nothing_where_inputs_do_not_go_together() -> None:
    weight, step = random(16, 200).float(), torch.full((16, 200), 0.25)
    inputs = 3 * torch.eye(200)
    assert torch.equal(
        rounding.compensated(weight, step, 7, inputs), (weight / step).round().clamp(-7, 7).to(torch.int8)
    )


def test_a_balanced_weight_is_rounded_once() -> None:
    x, linear = outliers(40, 96), layer()
    made = quantized(linear, LayerFormat(weight_bits=4, balanced=True), x)
    assert made.balancing is not None
    balanced = balance_weight(linear.weight.detach(), made.balancing)
    error = (made.products() * made.scale[:, None] - balanced).abs()
    assert (error <= made.scale[:, None] * (0.5 + 1e-5)).all() and error.max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_token_is_quantized_alike_in_any_company(format: LayerFormat, dtype: torch.dtype) -> None:
    x = outliers(2, 150, 96).to(dtype)
    made = quantized(layer().to(dtype), format, x)
    if format.activation_bits == 8:
        together, scales = kernels.quantize_tokens(x.flatten(0, 1))
        alone, scale = kernels.quantize_tokens(x[1, 7:8])
        assert torch.equal(together[157], alone[0]) and scales[157] == scale[0]
        assert together.abs().amax(-1).min() == 127
        assert torch.equal(made(x)[1], made(x[1]))
        assert torch.equal(made(x.flip(1)).flip(1), made(x))
    else:
        assert torch.allclose(made(x)[1], made(x[1]), rtol=1e-2)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_layer_takes_the_bits_that_its_format_says_and_stays_near(format: LayerFormat) -> None:
    x, linear = outliers(3, 50, 96).float(), layer()
    made = quantized(linear, format, x, clip=True)
    assert made.num_bytes() == format.num_bytes(96, 64)
    assert format.bits_per_weight(96, 64) == pytest.approx(8 * made.num_bytes() / (96 * 64))
    error = (made(x) - linear(x)).square().mean() / linear(x).square().mean()
    assert error < (3e-4 if format.weight_bits == 8 else 3e-2)
    assert made(x).shape == (3, 50, 64) and made(x.bfloat16()).dtype == torch.bfloat16


def test_large_layers_keep_their_promise_of_bytes() -> None:
    for text, share in (("w8a8", 0.52), ("w4a8", 0.29), ("w4a16", 0.29)):
        scheme = parse(text)
        format = scheme.format(scheme.weight_bits)
        for shape in ((1536, 1536), (1536, 8960), (8960, 1536)):
            assert format.bits_per_weight(*shape) / 16 <= share


@pytest.mark.parametrize("rows", [1, 5, 300])
def test_products_of_integers_are_exact(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(-127, 128, (rows, 1536), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (40, 1536), generator=generator, dtype=torch.int8)
    tokens[0], weight[0] = 127, 127
    found = kernels.integer_product(tokens, weight)
    expected = tokens.long() @ weight.long().T
    if kernels.name("cpu") == "int8":
        assert torch.equal(found.long(), expected)
    else:
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers be multiplied as where there is no compiler."""
    monkeypatch.setattr(cpu, "why_not_compiled", lambda: "there is no C++ compiler")


def test_many_tokens_are_multiplied_in_parts_with_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    by_torch(monkeypatch)
    x = outliers(700, 96).float()
    made = quantized(layer(), FORMATS[0], x)
    whole = made(x)
    monkeypatch.setitem(kernels.AT_ONCE, "cpu", 1)
    assert torch.equal(made(x), whole)


# Widths and tokens that no tile of the kernel divides; one token; more tokens than are balanced at once.
@pytest.mark.skipif(cpu.why_not_compiled() is not None, reason=cpu.why_not_compiled() or "")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 96, 64), (130, 66, 70), (700, 4096, 24), (67, 256, 330)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_compiled_kernel_gives_bit_by_bit_what_torch_gives(
    bias: bool,
    balanced: bool,
    bits: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, inputs, outputs = shape
    x, linear = outliers(tokens, inputs).to(dtype), nn.Linear(inputs, outputs, bias=bias).to(dtype)
    x[:1] = 0
    group = 32 if inputs % 32 == 0 else 2
    made = quantized(linear, LayerFormat(weight_bits=bits, group=group, balanced=balanced), x)
    found = made(x)
    by_torch(monkeypatch)
    assert torch.equal(found, made(x))


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_compiled_layer_is_one_graph_that_gives_the_same(
    format: LayerFormat, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a process that has not multiplied yet.
    monkeypatch.setattr(kernels, "_EXACT", {})
    if not is_compiled:
        by_torch(monkeypatch)
    for name in ("_FACTORS", "_INTEGERS", "_MATRICES"):
        monkeypatch.setattr(rotation, name, {})
    x = outliers(50, 96).float()
    made = quantized(layer(), format, x)
    called: list[str] = []

    def remember(graph: Any, inputs: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    assert torch.equal(torch.compile(made, backend=remember, fullgraph=True)(x), made(x))
    is_native = format.activation_bits == 8 and is_compiled and cpu.takes("cpu", x.dtype)
    assert ("vgen.integer_linear" in called) == is_native
    assert ("vgen.int4_products" in called) == (format.weight_bits == 4 and not is_native)
    assert not any("kron" in target for target in called)


@pytest.mark.parametrize("is_compiled", [True, False])
def test_what_is_not_finite_is_not_hidden(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_compiled:
        by_torch(monkeypatch)
    x = outliers(8, 96).float()
    made = quantized(layer(), FORMATS[0], x)
    x[2, 4], x[3, 5] = torch.nan, torch.inf
    finite = made(x).isfinite().all(-1)
    assert finite.tolist() == [True, True, False, False, True, True, True, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("w4a9", 'no scheme "w4a9"'),
        ("w8a8:group=64", 'no option "group"'),
        ("w4a8:group=7", "A group of 7 weights"),
        ("w4a8:alpha=2", "An alpha of 2"),
        ("w4a8-mp:bits=3", "average of 3 bits"),
        ("w4a8:group=big", "a whole number is expected"),
    ],
)
def test_schemes_that_do_not_exist_are_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(text)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_says_what_it_is(name: str) -> None:
    scheme = parse(name)
    assert scheme.name == name and dataclasses.is_dataclass(scheme)
    format = scheme.format(scheme.weight_bits)
    assert name.startswith(f"w{format.weight_bits}a{format.activation_bits}")
    assert scheme.is_calibrated == format.balanced
