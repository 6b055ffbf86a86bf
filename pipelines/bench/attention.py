"""What attention costs, dense and sparse, side by side in one run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vgen import attention
from vgen.attention import kernels
from vgen.attention.patterns import Grid
from vgen.errors import UsageError, did_you_mean
from vgen.pipelines.bench import check_memory, in_turns

if TYPE_CHECKING:
    from vgen.runtime import Runtime

# The shapes of published models, for blocks of the real classes with random weights: 480p, 81 frames.
MODELS: dict[str, tuple[str, dict[str, int], Grid]] = {
    "wan2.1-1.3b": ("wan", {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}, (21, 30, 52)),
    "wan2.1-14b": ("wan", {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}, (21, 30, 52)),
    "hunyuanvideo": ("hunyuan-video", {"num_attention_heads": 24, "attention_head_dim": 128}, (21, 30, 53)),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An attention: tokens, heads, numbers per head."""

    tokens: int
    heads: int
    head_dim: int


def bench_attention(
    shape: Shape, density: float, *, kernel: str, block: int, repeats: int, chosen: Runtime
) -> dict[str, Any]:
    """Return seconds of dense attention and of a kernel at a random mask with as many blocks in each row.

    `ideal` is what dense attention would take if it took the density's share of its time, and `efficiency` how much of
    that is reached. Dense is torch's own `scaled_dot_product_attention`. Both are run in turn, after one run each to
    warm up; the seconds are medians. The density is that of whole blocks. Raises `UsageError` and `VgenError`.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from vgen.attention.blocks import BlockMask, cut

    if not 0 < density <= 1:
        raise UsageError(f"A density of {density:g} is not legal.", tip="choose more than 0 and up to 1.")
    attention.parse(f"dense:block={block}")  # for its checks
    kernels.check_block(kernel, block)
    name = kernels.choose(kernel, chosen.device, block)
    # Queries, keys, values and what comes out, made in float32; and the random order of all blocks.
    num_blocks = -(-shape.tokens // block)
    check_memory(shape.heads * (16 * shape.tokens * shape.head_dim + 12 * num_blocks**2), chosen.device)
    said, module = kernels.bound(name), kernels.load(name)
    generator = torch.Generator().manual_seed(0)
    size = (1, shape.heads, shape.tokens, shape.head_dim)
    q, k, v = (torch.randn(size, generator=generator).to(chosen.device, chosen.torch_dtype) for _ in range(3))
    layout = cut([torch.arange(shape.tokens, device=chosen.device)], torch.arange(0, device=chosen.device),
                 block=block, num_tokens=shape.tokens)  # fmt: skip
    count = max(1, round(density * layout.num_blocks))
    ranks = torch.rand(1, shape.heads, layout.num_blocks, layout.num_blocks, generator=generator).argsort(-1)
    mask = BlockMask(kept=(ranks < count).to(chosen.device), layout=layout)
    scale = shape.head_dim**-0.5
    seconds = in_turns(
        {
            "dense": lambda: scaled_dot_product_attention(q, k, v),
            "sparse": lambda: layout.join(module.attend(*(layout.split(x) for x in (q, k, v)), mask, scale)),
        },
        repeats,
        chosen,
    )
    kept = 1 - mask.sparsity
    ideal = seconds["dense"] * kept
    return {
        "dense_s": seconds["dense"],
        "sparse_s": seconds["sparse"],
        "speedup": seconds["dense"] / seconds["sparse"],
        "ideal": 1 / kept,
        "efficiency": ideal / seconds["sparse"],
        "density": kept,
        "kernel": said,
        "block": block,
        "dtype": chosen.dtype,
        "device": chosen.device,
        "threads": torch.get_num_threads(),
    }


def bench_block(model: str, asked: str, *, repeats: int, chosen: Runtime) -> dict[str, Any]:
    """Return seconds of one transformer block of a model's real shape, random weights, with and without a pattern.

    The pattern is at the step after its search; `search_s` is what the step took that searched, dense attention and
    all, which is done once or twice in a run. A pattern that does not search has the time of its first step there.
    Raises `UsageError`.
    """
    import torch

    from vgen.attention.sparse import SparseAttention

    if model not in MODELS:
        raise UsageError(
            f'No shapes are known of "{model}".{did_you_mean(model, MODELS)}', tip=f"choose {', '.join(MODELS)}."
        )
    family, config, grid = MODELS[model]
    transformer, inputs = _block_of(family, config, grid, chosen)
    slots = [
        module for name, module in transformer.named_modules() if name.endswith(("blocks.0.attn1", "blocks.0.attn"))
    ]
    backbone: Any = SimpleNamespace(
        runtime=chosen,
        attention_slots=lambda: slots,
        num_text_tokens=lambda: 256 if family == "hunyuan-video" else 0,
        text_comes_first=False,
    )
    sparse = SparseAttention(attention.parse(asked), backbone, grid)
    sparse.begin(50)

    def run(*, is_sparse: bool) -> None:
        with sparse.attached() if is_sparse else nullcontext():
            transformer(**inputs, return_dict=False)

    with torch.inference_mode():
        sparse.step = 10  # the first after AdaSpa's warm-up, which searches
        search = in_turns({"search": lambda: run(is_sparse=True)}, 1, chosen, warm=False)["search"]
        sparse.step = 11  # sparse from here on
        run(is_sparse=True)
        found = in_turns(
            {"dense": lambda: run(is_sparse=False), "sparse": lambda: run(is_sparse=True)}, repeats, chosen, warm=False
        )
    did = sparse.to_dict()
    return {
        "model": model,
        "tokens": list(grid),
        "dense_s": found["dense"],
        "sparse_s": found["sparse"],
        "speedup": found["dense"] / found["sparse"],
        "search_s": search,
        "attention": asked,
        "kernel": did["kernel"],
        "sparsity": did["sparsity_when_sparse"],
        "dtype": chosen.dtype,
        "device": chosen.device,
    }


def _block_of(family: str, config: dict[str, int], grid: Grid, chosen: Runtime) -> tuple[Any, dict[str, Any]]:
    """Return a transformer of one block, and inputs of 480p and 81 frames for it."""
    import torch

    torch.manual_seed(0)
    latents = torch.randn(1, 16, grid[0], 2 * grid[1], 2 * grid[2])
    common = {"hidden_states": latents, "timestep": torch.tensor([500.0])}
    if family == "wan":
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

        transformer = WanTransformer3DModel(num_layers=1, **config)
        inputs = {**common, "encoder_hidden_states": torch.randn(1, 512, 4096)}
    else:
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

        transformer = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=0, num_refiner_layers=0, **config)
        inputs = {
            **common,
            "encoder_hidden_states": torch.randn(1, 256, 4096),
            "encoder_attention_mask": torch.ones(1, 256, dtype=torch.bool),
            "pooled_projections": torch.randn(1, 768),
            "guidance": torch.tensor([6000.0]),
        }
    dtype, device = chosen.torch_dtype, chosen.device
    moved = {
        name: value.to(device, dtype if value.is_floating_point() and name != "timestep" else None)
        for name, value in inputs.items()
    }
    # Not diffusers' own `to`, which warns of parts that trained weights need in float32.
    return torch.nn.Module.to(transformer, device, dtype).eval(), moved
