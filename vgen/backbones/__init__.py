"""Model families: what a sampler and a pipeline need of one, and how a checkpoint's is found."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from vgen import hub
from vgen.checkpoints import Checkpoint, fetch, verify
from vgen.errors import CheckpointError
from vgen.runtime import Runtime

if TYPE_CHECKING:
    from torch import Tensor

# Family -> the module and class that loads it, imported only when a checkpoint of the family is.
FAMILIES = {"wan": "vgen.backbones.wan:Wan"}


# What one prompt is to a model: a tensor, or several with their masks. Only the backbone that made it looks inside.
TextCondition: TypeAlias = Any


class Backbone(Protocol):
    """A loaded checkpoint. Latents are float32 [B, C, T, h, w] on the runtime's device."""

    checkpoint: Checkpoint
    runtime: Runtime

    def encode_prompt(self, prompts: Sequence[str]) -> list[TextCondition]:
        """Return what `velocity` takes, for each of the prompts."""

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that the tokenizer does not know, each once, in order."""

    def num_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has before it is cut to what the model reads."""

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, T, h, w) for a video of frames and pixels."""

    def sigmas(self, num_inference_steps: int) -> Tensor:
        """Return the checkpoint's own schedule, float32 [N + 1], from noise to 0."""

    def velocity(self, latents: Tensor, sigma: Tensor, text: TextCondition, known: Tensor | None = None) -> Tensor:
        """Return dx/dsigma, float32 as latents; `known` is true where the latents are given and free of noise."""

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Return latents for frames uint8 [B, F, H, W, 3]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return frames uint8 [B, F, H, W, 3] for latents."""


def load(
    checkpoint: Checkpoint, runtime: Runtime, *, decode_only: bool = False, progress: hub.Progress = hub.SILENT
) -> Backbone:
    """Return the backbone of a checkpoint on a runtime, its files fetched where they must be, and verified.

    With `decode_only` it holds what `decode` needs and nothing else; `progress` is told of downloads. Raises
    `CheckpointError`, and before anything is downloaded when the checkpoint is one that vgen cannot run.
    """
    require_runnable(checkpoint)
    checkpoint = fetch(checkpoint, progress)
    verify(checkpoint)
    module, _, name = FAMILIES[checkpoint.family].partition(":")
    backbone = getattr(importlib.import_module(module), name)
    return cast(Backbone, backbone(checkpoint, runtime, decode_only=decode_only))


def require_runnable(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` when vgen knows a checkpoint but lacks what it takes to run it."""
    can = checkpoint.can
    lacks = {
        f"its family, {checkpoint.family}": checkpoint.family not in FAMILIES,
        "an image as a condition of its own": can.image_to_video and not can.known_frames,
        "LoRAs": bool(checkpoint.loras),
        "the few steps that it was distilled for": bool(checkpoint.defaults.timesteps),
    }
    if missing := next((what for what, is_missing in lacks.items() if is_missing), None):
        raise CheckpointError(
            f'vgen knows "{checkpoint.name}" but cannot run it yet: it lacks {missing}.',
            tip="vgen models list tells which models run.",
        )
