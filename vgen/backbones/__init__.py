"""Model families: what a sampler and a pipeline need of one, and how a checkpoint's is found."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from vgen import hub, loras
from vgen.checkpoints import Checkpoint, fetch, verify
from vgen.errors import CheckpointError
from vgen.runtime import Runtime
from vgen.sampling.flow import Scheduler

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from vgen.conditioning.frames import GivenImages, ImageCondition
    from vgen.video import Sound

# Family -> the module and class that loads it, imported only when a checkpoint of the family is.
FAMILIES = {
    "wan": "vgen.backbones.wan:Wan",
    "hunyuan-video": "vgen.backbones.hunyuan_video:HunyuanVideo",
    "hunyuan-video-1.5": "vgen.backbones.hunyuan_video_15:HunyuanVideo15",
    "cogvideox": "vgen.backbones.cogvideox:CogVideoX",
    "ltx-video": "vgen.backbones.ltx_video:LTXVideo",
    "ltx-2": "vgen.backbones.ltx_2:LTX2",
}


# What one prompt is to a model: a tensor, or several with their masks. Only the backbone that made it looks inside.
TextCondition: TypeAlias = Any


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One video to be made, as far as a model knows it besides its prompt.

    Sizes are in pixels, `fps` in frames per second. All that is random comes from `generator`, in the order in which
    the family's stock pipeline draws it.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    generator: Generator


class Backbone(Protocol):
    """A loaded checkpoint; every family inherits from this. Latents are float32 [B, C, T, h, w] on its device.

    A model of more than frames packs the rest into the same tensor, behind the frames in T, so that samplers, guidance
    and known frames are the same for all; only the backbone takes them apart.
    """

    checkpoint: Checkpoint
    runtime: Runtime
    # Whether text is before the video's tokens in joint self-attention; else it is behind them.
    text_comes_first: bool = False

    @abstractmethod
    def encode_prompt(self, prompts: Sequence[str], images: GivenImages | None = None) -> list[TextCondition]:
        """Return what `velocity` takes, for each of the prompts.

        `images` are given with the prompt that tells of them, and not with a negative one: some text encoders see.
        """

    @abstractmethod
    def encode_images(self, images: GivenImages, shot: Shot) -> ImageCondition:
        """Return what given images are to the loop and to `velocity`, for a shot of their size."""

    @abstractmethod
    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that the tokenizer does not know, each once, in order."""

    @abstractmethod
    def num_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has before it is cut to what the model reads."""

    @abstractmethod
    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, T, h, w) for a video of frames and pixels."""

    def noise(self, shot: Shot) -> Tensor:
        """Return the noise [1, C, T, h, w] that a shot starts from."""
        from vgen.backbones.components import normal_noise

        shape = self.latent_shape(shot.num_frames, shot.height, shot.width)
        return normal_noise(shape, shot, self.runtime.device)

    @abstractmethod
    def sigmas(self, num_inference_steps: int, shot: Shot) -> Tensor:
        """Return the checkpoint's own schedule for a shot, float32 [N + 1], from noise to 0."""

    @abstractmethod
    def native_scheduler(self, num_inference_steps: int, shot: Shot) -> Scheduler:
        """Return the checkpoint's own scheduler for `sigmas`, which serves one video.

        Raises `CheckpointError` where it cannot be stepped from the velocities of a flow.
        """

    @abstractmethod
    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        text: TextCondition,
        known: Tensor | None = None,
        *,
        shot: Shot,
        image: Any = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Return dx/dsigma, float32 as latents; `known` is true where the latents are given and free of noise.

        `image` is `inputs` of an `ImageCondition`. `guidance_scale` is what a model is told that was distilled to be
        guided by itself; one that was not ignores it.
        """

    def is_below_boundary(self, sigma: Tensor) -> bool:
        """Return whether a checkpoint's second transformer runs at a sigma; False where there is one."""
        return False

    @abstractmethod
    def encode_frames(self, frames: Tensor, generator: Generator | None = None) -> Tensor:
        """Return latents for frames uint8 [B, F, H, W, 3]: their mean, or drawn as the stock pipeline draws them."""

    @abstractmethod
    def decode(self, latents: Tensor, shot: Shot) -> Tensor:
        """Return frames uint8 [B, F, H, W, 3] for latents of a shot."""

    def decode_sound(self, latents: Tensor, shot: Shot) -> Sound | None:
        """Return the sound track of one video's latents; None from a model that makes none."""
        return None

    @abstractmethod
    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T, H, W), the video's tokens in self-attention, of which W are neighbours in the sequence."""

    def num_text_tokens(self) -> int:
        """Return how many text tokens are in the sequence of self-attention, padding included.

        0 where the text is only attended to in attention of its own.
        """
        return 0

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Return the transformer's blocks in the order in which they run: where adapters attach."""

    @abstractmethod
    def attention_slots(self) -> list[nn.Module]:
        """Return the self-attention modules in the order in which they run; each takes `set_processor`."""


def load(
    checkpoint: Checkpoint, runtime: Runtime, *, decode_only: bool = False, progress: hub.Progress = hub.SILENT
) -> Backbone:
    """Return the backbone of a checkpoint on a runtime, its files fetched where they must be, and verified.

    With `decode_only` it holds what `decode` needs and nothing else, so no LoRAs; `progress` is told of downloads.
    LoRAs are a part of the weights, and the backbone's checkpoint tells what of them was. Raises `CheckpointError`,
    and before anything is downloaded when the checkpoint is one that vgen cannot run.
    """
    require_runnable(checkpoint)
    if decode_only:
        known = tuple(map(loras.identify, checkpoint.loras))
        checkpoint = fetch(replace(checkpoint, loras=()), progress)
        verify(checkpoint)
        checkpoint = replace(checkpoint, loras=known)
    else:
        checkpoint = fetch(checkpoint, progress)
        verify(checkpoint)
        if checkpoint.loras:
            from vgen.backbones import lora

            checkpoint = lora.check(checkpoint)
    module, _, name = FAMILIES[checkpoint.family].partition(":")
    family = getattr(importlib.import_module(module), name)
    backbone = cast(Backbone, family(checkpoint, runtime, decode_only=decode_only))
    _optimize(backbone)
    return backbone


def _optimize(backbone: Backbone) -> None:
    """Do to the loaded models what the runtime says; compiled code is below the hooks of offloading."""
    runtime = backbone.runtime
    if runtime.tiling:
        from vgen.backbones.components import models_of

        models_of(backbone)["vae"].enable_tiling()  # type: ignore[operator]
    if runtime.compile:
        from vgen.compiling import compile_blocks

        compile_blocks(backbone)
    if runtime.offload != "none":
        from vgen.offloading import offload

        offload(backbone)


def require_runnable(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` when vgen knows a checkpoint but lacks what it takes to run it."""
    lacks = {
        "a face as a condition": checkpoint.can.identity,
        f"the sparse attention that it was trained with, {checkpoint.defaults.attention}": bool(
            checkpoint.defaults.attention
        ),
    }
    if missing := next((what for what, is_missing in lacks.items() if is_missing), None):
        raise CheckpointError(
            f'vgen knows "{checkpoint.name}" but cannot run it yet: it lacks {missing}.',
            tip="vgen models list tells which models run.",
        )
