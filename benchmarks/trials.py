"""Small trials of what the base model's training has chosen: the DiT's size, latents, optimiser, rate and batch.

    python benchmarks/trials.py --minutes 3 -o trials
    python benchmarks/trials.py --minutes 4 --only "AdamW 2e-3" --only "Muon 4e-3"

Each trial trains a DiT from nothing on the same rendered images, for `--minutes` of its own. They take turns of a few
seconds, so that whatever else the machine does slows all of them. Prints one JSON object: for each its steps, its loss
on images that none has seen, with the same noise for all, and the share of what was asked of generated images that
the probes read in them. The loss of other latents is another quantity. Short trials favour what is small.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from toyland import cpu_name
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from vgen import checkpoints
from vgen.sampling.euler import euler
from vgen.sampling.guidance import classifier_free
from vgen.sampling.schedule import shifted
from vgen.toyland import prompts, text
from vgen.toyland.probes import Probes, load
from vgen.training.base import (
    CONFIG,
    PADDINGS,
    Batch,
    TextToVelocity,
    attention_by_products,
    batch_maker,
    flow_matching_loss,
    optimizers_of,
)
from vgen.training.codec import decode, load_codec
from vgen.training.export import SHIFT
from vgen.training.latents import LatentSet, latent_set, latent_statistics
from vgen.training.loop import Budget, learning_rate_factor, rates_of, set_rates

IMAGES, UNSEEN, TURN_SECONDS = 3072, 256, 10.0
WARMUP_STEPS = 30
DRAWN, STEPS, GUIDANCE, LATENT = 64, 12, 3.0, (24, 1, 16, 16)
STILL = ("scene", "colour", "shape", "size")  # what an image shows


def adamw(model: TextToVelocity, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return AdamW for everything; the text encoder a tenth as fast, as under Muon."""
    groups = [
        {"params": list(model.transformer.parameters()), "lr": learning_rate},
        {"params": list(model.text_encoder.parameters()), "lr": 0.1 * learning_rate},
    ]
    return [torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is tried: the DiT's size, an optimiser with its rate, and how many images a step learns from."""

    heads: int = 4
    layers: int = 6
    optimizers: Callable[[TextToVelocity, float], list[torch.optim.Optimizer]] = optimizers_of
    learning_rate: float = 2e-3
    batch_size: int = 48
    unit_channels: bool = False
    """Whether each channel of the latents is divided by its deviation, not by the square root of it."""

    @property
    def config(self) -> dict[str, Any]:
        """The DiT's configuration: heads of the same width, a feed-forward four times as wide as all of them."""
        width = self.heads * 64
        return {**CONFIG, "num_attention_heads": self.heads, "num_layers": self.layers, "ffn_dim": 4 * width}


TRIALS = {
    "as chosen": Trial(),  # width 256, 6 layers, Muon 2e-3, 48 images
    "width 192": Trial(heads=3),
    "width 384": Trial(heads=6),
    "3 layers": Trial(layers=3),
    "12 layers": Trial(layers=12),
    "Muon 1e-3": Trial(learning_rate=1e-3),
    "Muon 4e-3": Trial(learning_rate=4e-3),
    "AdamW 5e-4": Trial(optimizers=adamw, learning_rate=5e-4),
    "AdamW 1e-3": Trial(optimizers=adamw, learning_rate=1e-3),
    "AdamW 2e-3": Trial(optimizers=adamw, learning_rate=2e-3),
    "16 images": Trial(batch_size=16),
    "latents with channels of unit variance": Trial(unit_channels=True),
}


@dataclass
class Run:
    """A trial under way: `mean` and `std` [1, C, 1, 1, 1] normalise its latents, `make` makes its batches of these."""

    trial: Trial
    model: TextToVelocity
    mean: Tensor
    std: Tensor
    make: Callable[[int, int], Batch]
    seconds: float = 0.0
    step: int = 0
    optimizers: list[torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        self.optimizers = self.trial.optimizers(self.model, self.trial.learning_rate)
        self.rates = rates_of(self.optimizers)

    def turn(self, budget: Budget, seconds: float) -> None:
        """Train for `seconds`, and no longer than the budget."""
        assert budget.minutes is not None
        end = min(self.seconds + seconds, 60 * budget.minutes)
        while self.seconds < end:
            start = time.perf_counter()
            factor = learning_rate_factor(self.step, self.seconds / 60 / budget.minutes, budget)
            set_rates(self.optimizers, self.rates, factor)
            loss_of(self.model, self.make(self.step, self.trial.batch_size)).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
            self.seconds += time.perf_counter() - start


def loss_of(model: TextToVelocity, batch: Batch) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16), attention_by_products():
        return flow_matching_loss(model, batch)


@torch.no_grad()
def unseen_loss(model: TextToVelocity, make: Callable[[int, int], Batch]) -> float:
    """Return the mean loss of a few batches that are the same for every trial."""
    return sum(float(loss_of(model.eval(), make(step, 64))) for step in range(8)) / 8


@torch.inference_mode()
def right(run: Run, vae: AutoencoderKLWan, read: Probes) -> float:
    """Return how much of what the held-out prompts ask of an image the probes read in it."""
    wanted = prompts.held_out()[:DRAWN]
    tokens = text.tokenizer()([one.text for one in wanted], padding=True, return_tensors="pt").input_ids
    unasked = text.tokenizer()([""] * len(wanted), padding=True, return_tensors="pt").input_ids

    def velocity(latents: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found: Tensor = run.model(latents, (1000 * sigma).expand(len(latents)), words, PADDINGS[0])
        return found.float()

    noise = torch.randn(len(wanted), *LATENT, generator=torch.Generator().manual_seed(0))
    sigmas = shifted(torch.linspace(1, 0, STEPS + 1), SHIFT)
    latents = euler(classifier_free(velocity, tokens, unasked, GUIDANCE), noise, sigmas) * run.std + run.mean
    frames = decode(vae, latents)
    found = zip(read.read(list(frames)), (prompts.truth(one.clip) for one in wanted), strict=True)
    return statistics.mean(one.guesses[name] == told[name] for one, told in found for name in STILL)


def part(images: LatentSet, chosen: slice) -> LatentSet:
    """Return some of the images."""
    return LatentSet(clips=images.clips[chosen], latents=images.latents[chosen], coverage=images.coverage[chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, for each trial")
    parser.add_argument("-o", "--output", type=Path, default=Path("trials"), help="the folder of the encoded images")
    parser.add_argument("--only", action="append", choices=TRIALS, help="trials beside the one as chosen")
    options = parser.parse_args()
    folder = checkpoints.resolve("toyland").folder
    assert folder is not None
    vae = load_codec(folder / "vae")
    images = latent_set(options.output, vae, count=IMAGES + UNSEEN, num_frames=1, height=128, width=128)
    facts = latent_statistics(images.latents)
    mean, root = (torch.tensor(facts[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    deviation = images.latents.float().std((0, 2, 3, 4), keepdim=True)
    tokenizer = text.tokenizer()

    def batches(std: Tensor, chosen: slice) -> Callable[[int, int], Batch]:
        return batch_maker([part(images, chosen)], tokenizer, mean=mean, std=std, seed=0)

    budget = Budget(minutes=options.minutes, warmup_steps=WARMUP_STEPS)
    runs = {}
    for name, trial in TRIALS.items():
        if options.only and name not in ("as chosen", *options.only):
            continue
        torch.manual_seed(0)
        encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        model = TextToVelocity(encoder, WanTransformer3DModel(**trial.config)).train()
        std = deviation if trial.unit_channels else root
        runs[name] = Run(trial, model, mean, std, batches(std, slice(IMAGES)))
    while any(run.seconds < 60 * options.minutes for run in runs.values()):
        for run in runs.values():
            run.turn(budget, TURN_SECONDS)
    read = load()
    found = {
        "machine": f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "minutes": options.minutes,
        "images": IMAGES,
        "trials": {
            name: {
                "million_parameters": round(sum(p.numel() for p in run.model.transformer.parameters()) / 1e6, 2),
                "steps": run.step,
                "images_per_second": round(run.step * run.trial.batch_size / run.seconds, 1),
                "unseen_loss": round(unseen_loss(run.model, batches(run.std, slice(IMAGES, None))), 4),
                "right": round(right(run, vae, read), 3),
            }
            for name, run in runs.items()
        },
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
