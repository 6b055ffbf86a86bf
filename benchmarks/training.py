"""Measures what bounds the training of the base model: the data path, the DiT's step, and what surrounds it.

    python benchmarks/training.py

Prints one JSON object: clips a second of rendering and encoding; of the step's parts the milliseconds; and the DiT's
forward and backward pass in GFLOP/s, products and attention counted, beside a bfloat16 product of the same width.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from itertools import islice

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toyland import cpu_name

from vgen import checkpoints
from vgen.toyland import text
from vgen.toyland.renderer import render
from vgen.toyland.scene import sample_clips
from vgen.training.base import (
    COMPILED,
    CONFIG,
    PADDINGS,
    TextToVelocity,
    attention_by_products,
    batch_maker,
    flow_matching_loss,
    optimizers_of,
)
from vgen.training.codec import load_codec
from vgen.training.latents import LatentSet, encode_clips

REPEATS = 5
STEPS = {"images": (1, 80), "videos": (17, 16)}  # frames and batch size of the last stage, at 128 x 128


def seconds(work: Callable[[], object]) -> float:
    """Return the median seconds of `work`, after two calls that warm it up and compile."""
    work(), work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matrix_rate(dtype: torch.dtype) -> float:
    """Return the GFLOP/s of a product of the DiT's shape: 4,096 tokens, its width, its feed-forward's width."""
    width, inner = CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"], CONFIG["ffn_dim"]  # type: ignore[operator]
    tokens, weights = torch.randn(4096, width, dtype=dtype), torch.randn(width, inner, dtype=dtype)  # type: ignore[call-overload]
    repeats = 50
    return repeats * 2 * 4096 * width * inner / seconds(lambda: [tokens @ weights for _ in range(repeats)]) / 1e9  # type: ignore[operator,no-any-return]


def step_parts(frames: int, batch_size: int) -> dict[str, float]:
    """Return the milliseconds of a training step's parts, and the rate of its forward and backward pass."""
    torch.manual_seed(0)
    model = TextToVelocity(text.text_encoder(), WanTransformer3DModel(**CONFIG)).train()
    latent_frames = (frames - 1) // 4 + 1
    clips = list(islice(sample_clips(1), 64))
    latents = torch.randn(64, CONFIG["in_channels"], latent_frames, 16, 16).bfloat16()  # type: ignore[call-overload]
    data = LatentSet(clips=clips, latents=latents, coverage=torch.zeros(64, latent_frames, 16, 16).bfloat16())
    make = batch_maker([data], text.tokenizer(), mean=torch.zeros(1), std=torch.ones(1), seed=0)
    plain = next(step for step in range(99) if not (one := make(step, 2)).known.any() and one.padding == PADDINGS[0])
    batch = make(plain, batch_size)
    optimizers = optimizers_of(model, 1e-9)

    def forward_backward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = flow_matching_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it sees no other backend of CPUs
        forward_backward()
    operations = counter.get_total_flops()
    model.transformer.compile_repeated_blocks(options=COMPILED)
    parts = {
        "batch_ms": seconds(lambda: make(plain, batch_size)),
        "forward_backward_ms": seconds(attention_by_products()(forward_backward)),
        "optimizers_ms": seconds(lambda: [optimizer.step() for optimizer in optimizers]),
    }
    return {
        **{name: round(1000 * value, 1) for name, value in parts.items()},
        "clips_per_second": round(batch_size / sum(parts.values()), 1),
        "gflop_per_second": round(operations / parts["forward_backward_ms"] / 1e9, 1),
    }


def main() -> None:
    folder = checkpoints.resolve("toyland").folder
    assert folder is not None
    vae = load_codec(folder / "vae")
    clips = list(islice(sample_clips(1), 8))
    rendering = seconds(lambda: render(clips))
    caching = seconds(lambda: encode_clips(vae, clips, 17, 128, 128))
    found = {
        "machine": f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "render_clips_per_second": round(len(clips) / rendering, 1),
        "render_and_encode_clips_per_second": round(len(clips) / caching, 1),
        "product_gflop_per_second": {
            "float32": round(matrix_rate(torch.float32), 1),
            "bfloat16": round(matrix_rate(torch.bfloat16), 1),
        },
        "step": {name: step_parts(*shape) for name, shape in STEPS.items()},
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
