"""Times `vgen generate` against stock `WanPipeline` on the embedded checkpoint, both as whole, cold processes.

    pip install imageio  # for diffusers' own writer
    python benchmarks/generate.py

Each takes the same prompt, seed, steps, guidance and dtype, and writes an mp4. Runs alternate; medians are compared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from toyland import cpu_name

from vgen import checkpoints

REPEATS = 3
PROMPT = "a large red ball bounces on the grass"
STOCK = """
import sys, torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video
folder, output, steps, guidance, prompt = sys.argv[1:]
pipeline = WanPipeline.from_pretrained(folder, dtype=torch.bfloat16)
pipeline.vae.to(torch.float32)
frames = pipeline(prompt, height=128, width=128, num_frames=17, num_inference_steps=int(steps),
    guidance_scale=float(guidance), generator=torch.Generator().manual_seed(1)).frames[0]
export_to_video(frames, output, fps=8)
"""


def seconds(command: list[str]) -> tuple[float, str]:
    """Return the wall seconds of a whole process and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    return time.perf_counter() - start, done.stdout


def main() -> None:
    checkpoint = checkpoints.resolve("toyland")
    steps, guidance = checkpoint.defaults.num_inference_steps, checkpoint.defaults.guidance_scale
    ours, second, stock, reports = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        prompts = out / "prompts.txt"
        prompts.write_text(f"{PROMPT}\n{PROMPT}, static camera\n")
        generate = [sys.executable, "-m", "vgen", "generate", "--format", "json", "--force"]
        for _ in range(REPEATS):
            wall, report = seconds([*generate, PROMPT, "--seed", "1", "-o", str(out / "ours.mp4")])
            ours.append(wall)
            reports.append(json.loads(report)["timings"])
            both, _ = seconds([*generate, "--prompts", str(prompts), "--seed", "1", "-o", str(out / "both.mp4")])
            second.append(both - wall)
            command = [sys.executable, "-c", STOCK, str(checkpoint.folder), str(out / "stock.mp4")]
            stock.append(seconds([*command, str(steps), str(guidance), PROMPT])[0])
    found = {
        "machine": f"{cpu_name()}, {os.cpu_count()} processors",
        "vgen_s": round(statistics.median(ours), 2),
        "vgen_timings": {name: round(statistics.median(one[name] for one in reports), 2) for name in reports[0]},
        "second_prompt_s": round(statistics.median(second), 2),
        "stock_s": round(statistics.median(stock), 2),
        "stock_over_vgen": round(statistics.median(stock) / statistics.median(ours), 2),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
