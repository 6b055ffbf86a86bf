"""Trains Toyland's text encoder to know what a caption says, before the DiT learns to draw it.

A large text encoder comes to a DiT with such knowledge; an untrained one is a second thing to learn at the same time,
and behind the noise of a diffusion loss. Every token learns to tell the whole caption's meaning, so that wherever
cross-attention looks, it finds the subject's colour and the camera's move.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from vgen.toyland import captions, text
from vgen.toyland.prompts import ATTRIBUTES
from vgen.toyland.scene import Clip, sample_clip
from vgen.training.loop import Budget, Progress, train

SUBJECT_TRAITS = {name: ATTRIBUTES[name] for name in ("shape", "colour", "size", "action")}
NONE = "none"  # of an absent second subject
TRAITS: dict[str, tuple[str, ...]] = {
    "scene": ATTRIBUTES["scene"],
    "camera": ATTRIBUTES["camera"],
    **{f"first {name}": values for name, values in SUBJECT_TRAITS.items()},
    **{f"second {name}": (NONE, *values) for name, values in SUBJECT_TRAITS.items()},
}


def traits_of(clip: Clip) -> dict[str, str]:
    """Return what a caption of `clip` can tell: a value for each of TRAITS."""
    traits = {"scene": clip.scene, "camera": clip.camera}
    for name in SUBJECT_TRAITS:
        first, *second = (getattr(subject, name) for subject in clip.subjects)
        traits[f"first {name}"] = first
        traits[f"second {name}"] = second[0] if second else NONE
    return traits


class CaptionReader(nn.Module):
    """A text encoder with a linear reading of every trait at every token."""

    def __init__(self, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.heads = nn.ModuleDict({name: nn.Linear(text.TEXT_WIDTH, len(values)) for name, values in TRAITS.items()})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return logits [N, values] of each trait for the N tokens of all captions; `tokens` [B, S] padded with 0."""
        mask = tokens != 0
        words = self.text_encoder(tokens, attention_mask=mask).last_hidden_state[mask]
        return {name: head(words) for name, head in self.heads.items()}


def train_text(
    folder: Path, *, budget: Budget, batch_size: int = 256, learning_rate: float = 2e-3, seed: int = 0
) -> UMT5EncoderModel:
    """Train a text encoder in `folder` and return it; the share of traits that its tokens tell right is in the log."""
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision="bf16")
    torch.manual_seed(seed)
    tokenizer = text.tokenizer()
    model = CaptionReader(text.text_encoder())
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.0)

    def loss_of(reader: nn.Module, step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{seed * accelerator.num_processes + accelerator.process_index}/{step}")
        clips = [sample_clip(rng) for _ in range(batch_size)]
        texts = [captions.caption(clip, rng, rng.choice(captions.LENGTHS)) for clip in clips]
        tokens = tokenizer(texts, padding=True, return_tensors="pt").input_ids.to(accelerator.device)
        traits = [traits_of(clip) for clip in clips]
        row = (tokens != 0).nonzero()[:, 0]  # the caption of each token
        with accelerator.autocast():
            logits = reader(tokens)
        losses, right = [], []
        for name, values in TRAITS.items():
            target = torch.tensor([values.index(one[name]) for one in traits], device=row.device)[row]
            losses.append(nn.functional.cross_entropy(logits[name].float(), target))
            right.append((logits[name].argmax(1) == target).float().mean())
        return {"loss": torch.stack(losses).mean(), "right": torch.stack(right).mean()}

    def on_save(average: nn.Module, progress: Progress) -> None:
        assert isinstance(average, CaptionReader)
        average.text_encoder.save_pretrained(folder / "text_encoder")

    trained = train(
        model, [optimizer], loss_of, folder=folder, budget=budget, accelerator=accelerator, on_save=on_save
    )
    assert isinstance(trained, CaptionReader)
    return trained.text_encoder
