"""Measures the renderer's speed and the embedded VAE's fidelity; prints one JSON object.

python benchmarks/toyland.py
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from itertools import islice
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from vgen import checkpoints
from vgen.toyland.renderer import render
from vgen.toyland.scene import sample_clips
from vgen.training.vae import held_out_psnr

REPEATS, CLIPS, HELD_OUT = 5, 16, 64


def render_rate(side: int) -> float:
    """Return the median clips of 17 frames rendered in a second at `side` × `side` pixels."""
    clips = list(islice(sample_clips(1), CLIPS))
    render(clips[:2], height=side, width=side)
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        render(clips, height=side, width=side)
        rates.append(CLIPS / (time.perf_counter() - start))
    return round(statistics.median(rates), 2)


def cpu_name() -> str:
    """Return the processor's name as Linux tells it, or what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    folder = checkpoints.resolve("toyland").folder
    assert folder is not None
    vae = AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    found = {
        "machine": f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "render_clips_per_second": {"128x128": render_rate(128), "64x64": render_rate(64)},
        "vae_psnr_db": round(held_out_psnr(vae, HELD_OUT), 2),
        "vae_held_out_clips": HELD_OUT,
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
