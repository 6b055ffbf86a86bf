"""Patterns and kernels of sparse attention, on their own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vgen import attention
from vgen.attention import PATTERNS, adaspa, kernels
from vgen.attention.blocks import BlockMask, Layout, cut, pack, unpack, with_text
from vgen.attention.mass import block_mass, recall
from vgen.attention.patterns import Grid, Pattern, Site
from vgen.attention.radial import Radial
from vgen.attention.tile import frame_tiles
from vgen.errors import UsageError, VgenError

TOLERANCE = 1e-5
HERE = [name for name in ("gather", "cpu") if kernels.why_not(name, "cpu") is None]


def tokens_of(grid: Grid, num_text: int, *, text_first: bool = False) -> tuple[Tensor, Tensor]:
    """Return video [T, H, W] and text [n] as indices into the sequence."""
    video = torch.arange(math.prod(grid)) + (num_text if text_first else 0)
    text = torch.arange(num_text) + (0 if text_first else math.prod(grid))
    return video.view(grid), text


def laid_out(pattern: Pattern, grid: Grid, num_text: int = 0) -> Layout:
    return pattern.layout(grid, *tokens_of(grid, num_text))


def normal(heads: int, length: int, dim: int = 8, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, heads, length, dim, generator=generator)
    return 2 * q, k, v


def at(grid: Grid, *, step: int = 0, num_steps: int = 10, heads: int = 4, **values: object) -> Site:
    fixed = {"layer": 0, "num_layers": 1, "branch": 0, "scale": 8**-0.5}
    return Site(grid=grid, step=step, num_steps=num_steps, num_heads=heads, **{**fixed, **values})  # type: ignore[arg-type]


def random_mask(layout: Layout, heads: int, density: float, seed: int = 0) -> BlockMask:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(1, heads, layout.num_blocks, layout.num_blocks, generator=generator) < density
    return BlockMask(kept=kept | torch.eye(layout.num_blocks, dtype=torch.bool), layout=layout)


def one_group(length: int, block: int, num_text: int = 0) -> Layout:
    video, text = tokens_of((1, 1, length - num_text), num_text)
    return cut([video.flatten()], text, block=block, num_tokens=length)


def sparse_by(kernel: str, layout: Layout, mask: BlockMask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [layout.split(x) for x in (q, k, v)]
    return layout.join(kernels.load(kernel).attend(*parts, mask, q.shape[-1] ** -0.5))


def expanded(mask: BlockMask) -> Tensor:
    """Return the mask of tokens [1, H, L, L] in their own order, written without the kernels' help."""
    layout = mask.layout
    block_of = torch.empty(layout.num_tokens, dtype=torch.long)
    for place, token in enumerate(layout.order.tolist()):
        if token >= 0:
            block_of[token] = place // layout.block
    return mask.kept[..., block_of, :][..., block_of]


# --- kernels


@pytest.mark.parametrize("kernel", ["reference", *HERE])
@pytest.mark.parametrize(("length", "num_text"), [(64, 0), (77, 0), (90, 10)])
def test_every_kernel_gives_what_attention_with_the_expanded_mask_gives(
    kernel: str, length: int, num_text: int
) -> None:
    q, k, v = normal(3, length)
    layout = one_group(length, 16, num_text)
    for heads in (3, 1):  # a mask for each head, and one for all
        mask = random_mask(layout, heads, 0.4)
        expected = scaled_dot_product_attention(q, k, v, attn_mask=expanded(mask))
        found = sparse_by(kernel, layout, mask, q, k, v)
        assert (found - expected).abs().max().item() <= TOLERANCE
    assert (found - scaled_dot_product_attention(q, k, v)).abs().max().item() > 0.01


@pytest.mark.parametrize("kernel", ["reference", *HERE])
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_at_density_1_equals_dense_attention(name: str, kernel: str) -> None:
    grid = (5, 4, 7)  # nothing divides anything
    whole = {"tile": ",global=5", "adaspa": ",sparsity=0,adaptive=false,warmup=0", "sliding-tile": ",window=9x9x9"}
    options = whole.get(name, ",width=16" if name == "radial" else "") + (
        ",tile=2x2x4" if name == "sliding-tile" else ""
    )
    pattern = attention.parse(f"{name}:kernel={kernel},block=16{options}")
    q, k, v = normal(2, math.prod(grid) + 9)
    layout = laid_out(pattern, grid, 9)
    parts = [layout.split(x) for x in (q, k, v)]
    site = at(grid, heads=2)
    expected = scaled_dot_product_attention(q, k, v)
    first = pattern.choose(*parts, layout, site)
    if first.output is not None:  # a search, which is dense
        assert (layout.join(first.output) - expected).abs().max().item() <= TOLERANCE
        first = pattern.choose(*parts, layout, site)
    assert first.mask is not None and first.mask.sparsity == pytest.approx(0, abs=1e-9)
    found = sparse_by(kernel, layout, first.mask, q, k, v)
    assert (found - expected).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("kernel", HERE)
def test_bfloat16_rounds_no_more_than_dense_attention_does(kernel: str) -> None:
    q, k, v = (x.bfloat16() for x in normal(2, 256, 64))
    layout = one_group(256, 64)
    mask = random_mask(layout, 2, 0.5)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=expanded(mask))
    dense = scaled_dot_product_attention(q, k, v, attn_mask=expanded(mask))
    found = sparse_by(kernel, layout, mask, q, k, v)
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 1.5 * (dense - exact).norm() + 1e-3 * exact.norm()


def test_flex_takes_lists_of_blocks() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    from vgen.attention.kernels.flex import block_mask

    q, k, v = normal(2, 150, 16)
    layout = one_group(150, 64)  # the last block is ragged
    mask = random_mask(layout, 2, 0.5)
    parts = [layout.split(x) for x in (q, k, v)]
    found = layout.join(flex_attention(*parts, block_mask=block_mask(mask), scale=0.25))  # type: ignore[arg-type]
    expected = scaled_dot_product_attention(q, k, v, attn_mask=expanded(mask))
    assert (found - expected).abs().max().item() <= TOLERANCE


def test_a_row_that_sees_nothing_is_an_error() -> None:
    layout = one_group(64, 16)
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[2] = False
    with pytest.raises(VgenError, match="attend to nothing"):
        with_text(kept, layout)


def test_masks_are_packed_eight_blocks_to_a_byte() -> None:
    kept = torch.rand(2, 3, 19, 19) < 0.5
    assert pack(kept).shape == (2, 3, 19, 3)
    assert torch.equal(unpack(pack(kept), 19), kept)


# --- layouts


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_tokens_are_split_into_blocks_and_joined_again(name: str, text_first: bool) -> None:
    grid = (3, 5, 6)
    pattern = attention.parse(f"{name}:block=32" + (",tile=2x3x4" if name == "sliding-tile" else ""))
    layout = pattern.layout(grid, *tokens_of(grid, 7, text_first=text_first))
    x = torch.randn(1, 2, 97, 4)
    split = layout.split(x)
    assert split.shape[2] == layout.num_blocks * 32
    assert torch.equal(layout.join(split), x)
    assert layout.sizes.sum() == 97 and layout.num_text_blocks == 1
    assert split[:, :, layout.is_padded].abs().max() == 0
    text = split[:, :, -32:-25]
    assert torch.equal(text, x[:, :, :7] if text_first else x[:, :, -7:])


# --- tile


@pytest.mark.parametrize(
    ("num_frames", "num_global", "percent"), [(8, 4, 18.8), (8, 3, 31.3), (8, 2, 46.9), (8, 1, 65.6), (24, 6, 53.1)]
)
def test_tiles_prune_what_the_formula_says(num_frames: int, num_global: int, percent: float) -> None:
    grid = (num_frames, 3, 7)  # 21 tokens, which fill no block
    pattern = attention.parse(f"tile:global={num_global},block=16")
    layout = laid_out(pattern, grid)
    q, k, v = (layout.split(x) for x in normal(2, math.prod(grid)))
    mask = pattern.choose(q, k, v, layout, at(grid)).mask
    assert mask is not None
    expected = (num_frames - num_global) * (num_frames - num_global - 1) / num_frames**2
    assert mask.sparsity == pytest.approx(expected, abs=1e-12)
    assert 100 * mask.sparsity == pytest.approx(percent, abs=0.06)  # Efficient-vDiT's table 1, less its rounding
    assert torch.equal(mask.kept, mask.kept.mT) and bool(mask.kept.diagonal(dim1=-2, dim2=-1).all())


def test_all_frames_global_is_dense() -> None:
    assert bool(frame_tiles(7, 7).all())
    assert frame_tiles(7, 0).sum() == 7


def test_a_plan_tells_each_layer_its_frames(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    layers = [{"layer": 0, "global": 1}, {"layer": 1, "global": None}]
    path.write_text(json.dumps({"grid": [6, 2, 4], "layers": layers}))
    pattern, grid = attention.parse(f"tile:plan={path},block=16"), (6, 2, 4)
    pattern.check(grid, 2)
    layout = laid_out(pattern, grid)
    q, k, v = (layout.split(x) for x in normal(2, math.prod(grid)))
    first, second = (pattern.choose(q, k, v, layout, at(grid, layer=layer, num_layers=2)) for layer in (0, 1))
    assert first.mask is not None and first.mask.sparsity == pytest.approx(5 * 4 / 36)
    assert second.mask is None  # dense
    with pytest.raises(UsageError, match="for 2 layers and 6 latent frames"):
        pattern.check((7, 2, 4), 2)
    (tmp_path / "broken.json").write_text('{"layers": 3}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "half.json").write_text('{"layers": [')
    for name, message in (
        ("broken.json", "is no plan of tiles: it is another kind of JSON"),
        ("list.json", "is no plan of tiles: it is another kind of JSON"),
        ("half.json", "is no plan of tiles: Expecting value"),
        (".", "is no plan of tiles: Is a directory"),
        ("none.json", "There is no plan"),
    ):
        with pytest.raises(UsageError, match=message):
            attention.parse(f"tile:plan={tmp_path / name}")


# --- sliding tiles and radial


def test_windows_are_moved_inside_at_borders() -> None:
    pattern, grid = attention.parse("sliding-tile:tile=2x2x4,window=3x1x3,block=16"), (10, 4, 20)
    layout = laid_out(pattern, grid)
    q, k, v = (layout.split(x) for x in normal(1, math.prod(grid)))
    mask = pattern.choose(q, k, v, layout, at(grid)).mask
    assert mask is not None
    assert set(mask.kept.sum(-1).flatten().tolist()) == {3 * 1 * 3}
    tiles = mask.kept.view(5, 2, 5, 5, 2, 5)
    assert tiles[0, 0, 0].nonzero().tolist() == [[t, 0, w] for t in range(3) for w in range(3)]
    assert tiles[4, 1, 2].nonzero().tolist() == [[t, 1, w] for t in (2, 3, 4) for w in (1, 2, 3)]


def test_radial_bands_halve_as_distances_double() -> None:
    grid = (17, 8, 32)  # 256 tokens in a frame, 16 blocks
    kept = Radial(block=16, sink=0).bands(grid).view(17, 16, 17, 16)
    assert torch.equal(kept, kept.permute(2, 3, 0, 1))
    share = kept.float().mean((1, 3))[0]
    assert share[0] == share[1] == 1
    assert 1 > share[2] > share[4] > share[8] > share[16] > 0
    assert bool(Radial(block=16, sink=2).bands(grid).view(17, 16, 17, 16)[:, :, :2].all())


def test_the_work_of_tile_and_radial_grows_slower_than_that_of_dense_attention() -> None:
    def pairs(name: str, num_frames: int) -> float:
        grid, pattern = (num_frames, 8, 8), attention.parse(name)
        layout = laid_out(pattern, grid)
        q, k, v = (layout.split(x) for x in normal(1, math.prod(grid), 2))
        mask = pattern.choose(q, k, v, layout, at(grid)).mask
        assert mask is not None
        return (1 - mask.sparsity) * math.prod(grid) ** 2

    assert pairs("tile:global=1", 64) / pairs("tile:global=1", 32) < 2.1
    assert pairs("radial:sink=0", 64) / pairs("radial:sink=0", 32) < 2.6


# --- adaspa


def test_the_mass_of_blocks_is_the_sum_of_the_softmax() -> None:
    length, b = 70, 16
    q, k, _ = normal(2, length)
    layout = one_group(length, b)
    found = block_mass(layout.split(q), layout.split(k), layout, 8**-0.5)
    weights = (q @ k.mT * 8**-0.5).softmax(-1)
    for i in range(layout.num_blocks):
        for j in range(layout.num_blocks):
            expected = weights[..., i * b : (i + 1) * b, j * b : (j + 1) * b].sum((-1, -2))
            assert (found[..., i, j] - expected).abs().max().item() <= TOLERANCE
    # Each row of the softmax sums to 1, so a row of blocks to the tokens in it.
    assert (found.sum(-1) - layout.sizes).abs().max().item() <= 1e-4


@given(st.integers(2, 6), st.integers(40, 100), st.integers(0, 2**31))
def test_one_pass_with_the_lse_equals_two(heads: int, length: int, seed: int) -> None:
    q, k, v = normal(heads, length, seed=seed)
    layout = one_group(length, 16)
    parts = [layout.split(x) for x in (q, k, v)]
    output, lse = adaspa.dense_with_lse(*parts, layout, 8**-0.5)
    assert (layout.join(output) - scaled_dot_product_attention(q, k, v)).abs().max().item() <= TOLERANCE
    once = block_mass(parts[0], parts[1], layout, 8**-0.5, lse)
    assert (once - block_mass(parts[0], parts[1], layout, 8**-0.5)).abs().max().item() <= 1e-4


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_kernels_search_as_torch_does(kernel: str, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = (x.to(dtype) for x in normal(2, 150, 24))  # the last block is ragged
    layout = one_group(150, 32)
    parts = [layout.split(x) for x in (q, k, v)]
    _, lse = adaspa.dense_with_lse(*parts, layout, 0.25)
    for stale in (0.0, 3.0):  # the LSE of another step may be less than a score
        found = kernels.search(kernel, parts[0], parts[1], layout, 0.25, lse - stale)
        expected = block_mass(parts[0].double(), parts[1].double(), layout, 0.25, lse.double() - stale)
        assert found.dtype == torch.float32
        assert ((found - expected).abs() <= tolerance * expected).all()


@given(st.integers(2, 9), st.integers(4, 40), st.floats(0.34, 0.95), st.integers(0, 2**31))
def test_rows_have_as_many_blocks_and_heads_keep_the_mean_sparsity(
    heads: int, blocks: int, sparsity: float, seed: int
) -> None:
    layout = one_group(blocks * 16 + 5, 16, num_text=5)
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0, 12, heads).view(1, -1, 1, 1)  # heads that are easy to recall, and some that are not
    mass = (torch.randn(1, heads, blocks + 1, blocks + 1, generator=generator) * sharpness).softmax(-1)
    mask = adaspa.select(mass, layout, sparsity)
    counts = mask.kept[0, :, :blocks, :blocks].sum(-1)
    assert bool((counts == counts[:, :1]).all())
    assert bool(mask.kept[..., blocks].all()) and bool(mask.kept[..., blocks, :].all())  # text
    most = max(1, round((1 - sparsity) * blocks))
    assert counts.float().mean().item() == pytest.approx(most)
    plain = adaspa.select(mass, layout, sparsity, adaptive=False)
    assert bool((plain.kept[0, :, :blocks, :blocks].sum(-1) == most).all())
    best = mass[..., :blocks, :blocks].topk(most, dim=-1).values.sum(-1)
    assert torch.allclose((mass * plain.kept)[..., :blocks, :blocks].sum(-1), best)


def test_easy_heads_give_blocks_to_hard_ones() -> None:
    layout = one_group(20 * 16, 16)
    sharp = torch.eye(20) + 1e-4
    flat = torch.rand(20, 20, generator=torch.Generator().manual_seed(0)) + 1
    mass = torch.stack([sharp, flat, flat, sharp])[None]
    kept = adaspa.select(mass / mass.sum(-1, keepdim=True), layout, 0.8).kept
    assert kept.sum(-1)[0, :, 0].tolist() == [2, 6, 6, 2]  # 0.9, 0.7, 0.7, 0.9 of 20


def test_adaspa_searches_when_the_paper_does() -> None:
    grid = (4, 4, 16)
    pattern = attention.parse("adaspa:block=16")
    layout = laid_out(pattern, grid)
    memory: dict[str, object] = {}
    told = []
    for step in range(50):
        q, k, v = (layout.split(x) for x in normal(4, 256, seed=step))
        choice = pattern.choose(q, k, v, layout, at(grid, step=step, num_steps=50, memory=memory))
        told.append("sparse" if choice.mask is not None else "search" if choice.output is not None else "dense")
        if choice.mask is not None:
            assert choice.mask.sparsity == pytest.approx(0.8, abs=0.02)
            if step == 30:  # by its own q and k, and the LSE of step 10
                mass = block_mass(q, k, layout, 8**-0.5, memory["lse"])  # type: ignore[arg-type]
                assert torch.equal(choice.mask.kept, adaspa.select(mass, layout, 0.8).kept)
                searched = choice.mask.kept
            if step > 30:
                assert torch.equal(choice.mask.kept, searched)
    assert told == ["dense"] * 10 + ["search"] + ["sparse"] * 39
    assert memory["searched"] == 30


def test_a_search_that_was_skipped_is_made_up_for() -> None:
    grid, pattern = (4, 4, 16), attention.parse("adaspa:block=16")
    layout = laid_out(pattern, grid)
    q, k, v = (layout.split(x) for x in normal(4, 256))
    memory: dict[str, object] = {}
    for step, searched in ((13, 13), (29, 13), (33, 33), (34, 33)):
        pattern.choose(q, k, v, layout, at(grid, step=step, num_steps=50, memory=memory))
        assert memory["searched"] == searched


def test_the_chosen_blocks_recall_more_than_any_others() -> None:
    layout = one_group(256, 16)
    q, k, _ = normal(4, 256)
    mass = block_mass(q, k, layout, 8**-0.5)
    chosen = recall(adaspa.select(mass, layout, 0.75, adaptive=False), mass)
    for seed in range(5):
        order = torch.rand(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)).argsort(-1)
        assert bool((chosen > recall(BlockMask(kept=order < 4, layout=layout), mass)).all())
    assert bool((recall(BlockMask(kept=torch.ones(1, 1, 16, 16, dtype=torch.bool), layout=layout), mass) == 1).all())


# --- what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adaspo", 'no attention "adaspo". Did you mean "adaspa"'),
        ("adaspa:sparsty=0.5", 'no option "sparsty". Did you mean "sparsity"'),
        ("adaspa:sparsity=high", 'is "high", but a number is expected'),
        ("adaspa:sparsity=1", "sparsity of 1 is not legal"),
        ("adaspa:sparsity=0.2", "sparsity of 0.2 is not legal"),
        ("adaspa:search=1+2", "shares of the steps"),
        ("adaspa:warmup=3", "warm-up of 3 is not legal"),
        ("adaspa:block=70", "block of 70 tokens"),
        ("adaspa:kernel=flx", 'no kernel "flx". Did you mean "flex"'),
        ("adaspa:kernel=flex,block=32", '"flex" does no blocks of 32 tokens'),
        ("tile:global=-1", "-1 global frames"),
        ("sliding-tile:tile=8x8x8", "512 tokens, more than a block of 64"),
        ("sliding-tile:window=2x2x2", "has no middle"),
        ("sliding-tile:tile=4x4", "Cannot read tile"),
        ("radial:width=0", "width of 0"),
    ],
)
def test_bad_options_are_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        attention.parse(text)


def test_a_kernel_that_cannot_be_used_here_says_why() -> None:
    with pytest.raises(VgenError, match='"triton" cannot be used here: it runs on cuda, and this is cpu'):
        kernels.choose("triton", "cpu", 64)
    assert kernels.choose("auto", "cpu", 64) == "cpu"
    assert kernels.choose("auto", "mps", 64) == "gather"


def test_global_frames_are_those_of_the_video() -> None:
    with pytest.raises(UsageError, match="9 global frames are more than the 5"):
        attention.parse("tile:global=9").check((5, 4, 4), 2)


# --- several processes

SHARED_HEADS = """
import sys
import torch
from tests.test_attention import one_group
from vgen.attention import adaspa

rank, world, path = int(sys.argv[1]), 2, sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
layout = one_group(320, 16)
sharpness = torch.tensor([9.0, 1, 1, 9])[:, None, None]
mass = (torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(0)) * sharpness).softmax(-1)
whole = adaspa.select(mass, layout, 0.8).kept
assert len(set(whole.sum(-1)[0, :, 0].tolist())) > 1
own = adaspa.select(mass[:, 2 * rank : 2 * rank + 2], layout, 0.8, num_heads=4).kept
assert torch.equal(own, whole[:, 2 * rank : 2 * rank + 2])
torch.distributed.barrier()  # one that ends breaks off what the other still reads
torch.distributed.destroy_process_group()  # its threads abort a process that ends before them
"""


def test_processes_that_share_the_heads_choose_what_one_would(tmp_path: Path) -> None:
    import subprocess
    import sys

    root = Path(__file__).parent.parent
    ranks = [
        subprocess.Popen([sys.executable, "-c", SHARED_HEADS, str(rank), str(tmp_path / "meet")], cwd=root)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
