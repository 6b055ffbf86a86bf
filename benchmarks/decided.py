"""Measures at which noise what a video shows is decided, and where the embedded model decides wrongly.

    python benchmarks/decided.py --prompts 52

Real clips of the held-out prompts are noised to a sigma and denoised from there. What the probes then read wrong was
lost below that sigma; what they read wrong from sigma 1 on, and right from a lower one, was lost in between.
"""

from __future__ import annotations

import argparse
import json

import torch
from toyland import cpu_name

from vgen import backbones, checkpoints, runtime, video
from vgen.pipelines.evaluate.scores import read_all, score
from vgen.sampling.euler import euler
from vgen.sampling.guidance import classifier_free
from vgen.sampling.schedule import shifted
from vgen.toyland import prompts
from vgen.toyland.renderer import render
from vgen.training.export import SHIFT

SIGMAS, AT_ONCE = (1.0, 0.97, 0.92, 0.85, 0.7, 0.5), 13


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=52)
    options = parser.parse_args()
    checkpoint = checkpoints.resolve("toyland")
    model, defaults = backbones.load(checkpoint, runtime.choose("auto", "auto")), checkpoint.defaults
    assert defaults.num_inference_steps and defaults.guidance_scale and defaults.fps
    grid = shifted(torch.linspace(1, 0, defaults.num_inference_steps + 1), SHIFT)
    wanted = prompts.held_out()[: options.prompts]
    made: dict[float, list[video.Frames]] = {sigma: [] for sigma in SIGMAS}
    unasked = model.encode_prompt([""])[0]
    for start in range(0, len(wanted), AT_ONCE):
        chosen = wanted[start : start + AT_ONCE]
        text = torch.cat(model.encode_prompt([one.text for one in chosen]))
        velocity = classifier_free(
            model.velocity, text, unasked.expand(len(chosen), -1, -1), float(defaults.guidance_scale)
        )
        real = model.encode_frames(render([one.clip for one in chosen]).frames)
        noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(start))
        for sigma in SIGMAS:
            sigmas = torch.cat([torch.tensor([sigma]), grid[grid < sigma]])
            latents = euler(velocity, (1 - sigma) * real + sigma * noise, sigmas)
            made[sigma] += [model.decode(one[None])[0].numpy() for one in latents]
    truths = [prompts.truth(one.clip) for one in wanted]
    found = {
        "machine": f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "prompts": len(wanted),
        "denoised_from_sigma": {
            str(sigma): score(read_all(videos, defaults.fps), truths) for sigma, videos in made.items()
        },
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
