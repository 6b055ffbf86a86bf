"""Measures what of a caption the embedded model uses: the loss with the right caption, and with one word exchanged.

    python benchmarks/captions.py

Prints, for each sigma, the mean square error of the velocity on held-out clips: over all latents and where the subject
is. A word that the model follows costs when it is wrong, most where the noise hides what it names.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from vgen import backbones, checkpoints, runtime
from vgen.toyland.captions import caption
from vgen.toyland.scene import ACTIONS, CAMERAS, COLOURS, SCENES, SHAPES, SIZES, Clip, Subject, sample_clips
from vgen.training.latents import encode_clips
from vgen.training.vae import HELD_OUT_SEED

CLIPS, SIGMAS = 32, (0.99, 0.97, 0.93, 0.87, 0.75)


def next_of(names: tuple[str, ...], name: str) -> str:
    """Return another of `names`, always the same for a name."""
    return names[(names.index(name) + (2 if len(names) > 2 else 1)) % len(names)]


def with_subject(clip: Clip, **changes: Any) -> Clip:
    """Return the clip with its one subject changed."""
    subject: Subject = replace(clip.subjects[0], **changes)
    return replace(clip, subjects=(subject,))


def main() -> None:
    model = backbones.load(checkpoints.resolve("toyland"), runtime.choose("auto", "auto"))
    simple = (
        clip for clip in sample_clips(HELD_OUT_SEED) if len(clip.subjects) == 1 and clip.subjects[0].shape != "head"
    )
    clips = list(islice(simple, CLIPS))
    exchanged = {
        "right": clips,
        "scene": [replace(clip, scene=next_of(SCENES, clip.scene)) for clip in clips],
        "colour": [with_subject(clip, colour=next_of(tuple(COLOURS), clip.subjects[0].colour)) for clip in clips],
        "shape": [with_subject(clip, shape=next_of(SHAPES, clip.subjects[0].shape)) for clip in clips],
        "size": [with_subject(clip, size=next_of(tuple(SIZES), clip.subjects[0].size)) for clip in clips],
        "action": [with_subject(clip, actions=((0.0, next_of(ACTIONS, clip.subjects[0].action)),)) for clip in clips],
        "camera": [replace(clip, camera=next_of(CAMERAS, clip.camera)) for clip in clips],
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    with torch.inference_mode():
        encoded = encode_clips(model.vae, clips, 17, 128, 128)
        mean, std = (
            torch.tensor(model.vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std")
        )
        latents, coverage = (encoded["latents"].float() - mean) / std, encoded["coverage"].float()
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        for name, changed in exchanged.items():
            rng = random.Random(0)
            text = torch.cat(model.encode_prompt([caption(clip, rng, "medium") for clip in changed]))
            for sigma in SIGMAS:
                noisy = (1 - sigma) * latents + sigma * noise
                velocity = model.velocity(noisy, torch.tensor(sigma), text)
                error = (velocity - (noise - latents)).square().mean(1)
                found.setdefault(str(sigma), {})[name] = {
                    "all": round(float(error.mean()), 4),
                    "subject": round(float((error * coverage).sum() / coverage.sum()), 4),
                }
    print(json.dumps({"clips": CLIPS, "loss": found}, indent=2))


if __name__ == "__main__":
    main()
