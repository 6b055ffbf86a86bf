"""LTX-Video, text to video and image to video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vgen.backbones import Backbone, Shot
from vgen.backbones.components import (
    decode_or_tile,
    frames_of,
    load_component,
    load_scheduler,
    model_index,
    pixels_of,
)
from vgen.backbones.schedulers import FlowScheduler, flow_scheduler, set_shifted_timesteps, sigmas_of
from vgen.checkpoints import Checkpoint
from vgen.conditioning.frames import GivenImages, ImageCondition, first_frame
from vgen.conditioning.text import encodable, num_tokens, unknown_words
from vgen.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Text:
    """A prompt [1, L, D] in the transformer's dtype, and which of its tokens are no padding, bool [1, L]."""

    tokens: Tensor
    mask: Tensor


class LTXVideo(Backbone):
    """An LTX-Video checkpoint in diffusers' folder layout, loaded as diffusers loads it.

    Transformer and text encoder are in the runtime's dtype; VAE, latents and velocities are float32. A VAE that is
    told a timestep is told 0, the stock pipeline's default, at which no noise is mixed in before decoding; other
    values of `decode_timestep`, and `guidance_rescale`, off by default, are not reproduced. Raises `CheckpointError`
    when a component cannot be loaded.
    """

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime, *, decode_only: bool = False) -> None:
        self.checkpoint = checkpoint
        self.runtime = runtime
        index = model_index(checkpoint)

        def component(name: str, **options: Any) -> Any:
            return load_component(checkpoint, name, index.get(name), **options)

        self.vae = component("vae", torch_dtype=torch.float32).to(runtime.home)
        if decode_only:
            return

        self.tokenizer = component("tokenizer")
        self.scheduler = load_scheduler(checkpoint, index.get("scheduler"))
        self.text_encoder = component("text_encoder", dtype=runtime.torch_dtype).to(runtime.home)
        self.transformer = component("transformer", torch_dtype=runtime.torch_dtype).to(runtime.home)

    def encode_prompt(self, prompts: Sequence[str], images: GivenImages | None = None) -> list[Text]:
        """Return the tokens and the mask of each prompt."""
        tokens = self.tokenizer(
            [encodable(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.checkpoint.defaults.max_sequence_length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).to(self.runtime.device)
        # The encoder runs without the mask, as the model was trained; only the transformer heeds it.
        text = self.text_encoder(tokens.input_ids)[0].to(self.transformer.dtype)
        masks = tokens.attention_mask.bool().split(1)
        return [Text(tokens=tokens, mask=mask) for tokens, mask in zip(text.split(1), masks, strict=True)]

    def encode_images(self, images: GivenImages, shot: Shot) -> ImageCondition:
        """Return the first image as known latents."""
        num_latent_frames = self.latent_shape(shot.num_frames, shot.height, shot.width)[1]
        return ImageCondition(known=first_frame(self.encode_frames(images.first, shot.generator), num_latent_frames))

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that become the tokenizer's unknown token, each once, in order."""
        return unknown_words(self.tokenizer, encodable(prompt))

    def num_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has, with the end token."""
        return num_tokens(self.tokenizer, encodable(prompt))

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, T, h, w): for 161 frames of 512 x 704 pixels (128, 21, 16, 22)."""
        spatial = self.vae.spatial_compression_ratio
        num_latent_frames = (num_frames - 1) // self.vae.temporal_compression_ratio + 1
        return self.vae.config.latent_channels, num_latent_frames, height // spatial, width // spatial

    def sigmas(self, num_inference_steps: int, shot: Shot) -> Tensor:
        """Return the scheduler's sigmas, float32 [N + 1] on the CPU, larger the more tokens the shot has."""
        self._set_timesteps(num_inference_steps, shot)
        return sigmas_of(self.scheduler)

    def native_scheduler(self, num_inference_steps: int, shot: Shot) -> FlowScheduler:
        """Return the scheduler itself, in every published checkpoint Euler's."""
        self._set_timesteps(num_inference_steps, shot)
        return flow_scheduler(self.checkpoint, self.scheduler, shot.generator)

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        text: Text,
        known: Tensor | None = None,
        *,
        shot: Shot,
        image: None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Return dx/dsigma, float32 [B, C, T, h, w].

        latents [B, C, T, h, w]; sigma []; known bool, broadcast to [B, 1, T, h, w]: where it is true, the timestep of
        the token is 0. The frame rate of the shot stretches the positions in time.
        """
        batch, _, num_frames, height, width = latents.shape
        timestep = (sigma * self.scheduler.config.num_train_timesteps).to(latents.device).expand(batch)
        if known is not None:
            tokens = known.expand(batch, 1, num_frames, height, width).float()
            timestep = timestep[:, None] * (1 - self._pack(tokens)[..., 0])
        ratio = self.vae.spatial_compression_ratio
        velocity: Tensor = self.transformer(
            hidden_states=self._pack(latents).to(self.transformer.dtype),
            encoder_hidden_states=text.tokens.expand(batch, -1, -1),
            timestep=timestep,
            encoder_attention_mask=text.mask.expand(batch, -1),
            num_frames=num_frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.vae.temporal_compression_ratio / shot.fps, ratio, ratio),
            return_dict=False,
        )[0]
        return self._unpack(velocity.float(), num_frames, height, width)

    def encode_frames(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return latents [B, C, T, h, w] of frames uint8 [B, F, H, W, 3], normalised per channel."""
        posterior = self.vae.encode(pixels_of(frames.to(self.runtime.device)), return_dict=False)[0]
        latents: Tensor = posterior.mode() if generator is None else posterior.sample(generator)
        mean, std = self._statistics()
        normalised: Tensor = (latents.float() - mean) / std
        return normalised

    def decode(self, latents: Tensor, shot: Shot) -> Tensor:
        """Return frames uint8 [B, F, H, W, 3] of latents [B, C, T, h, w]; in tiles where memory does not suffice."""
        mean, std = self._statistics()
        latents = (latents * std / self.vae.config.scaling_factor + mean).to(self.vae.dtype)
        timestep = latents.new_zeros(latents.shape[0]) if self.vae.config.timestep_conditioning else None
        return frames_of(decode_or_tile(self.vae, latents, timestep))

    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T, H, W): for 161 frames of 512 x 704 pixels (21, 16, 22)."""
        _, num_latent_frames, latent_height, latent_width = self.latent_shape(num_frames, height, width)
        config = self.transformer.config
        patch = config.patch_size
        return num_latent_frames // config.patch_size_t, latent_height // patch, latent_width // patch

    def blocks(self) -> list[nn.Module]:
        """Return the transformer's blocks."""
        return list(self.transformer.transformer_blocks)

    def attention_slots(self) -> list[nn.Module]:
        """Return the self-attention of each of `blocks`."""
        return [block.attn1 for block in self.transformer.transformer_blocks]

    def _set_timesteps(self, num_inference_steps: int, shot: Shot) -> None:
        _, num_frames, height, width = self.latent_shape(shot.num_frames, shot.height, shot.width)
        num_tokens = num_frames * height * width
        # Where the configuration is silent, the stock pipeline's line.
        set_shifted_timesteps(self.scheduler, num_inference_steps, num_tokens, base=(256, 0.5), most=(4096, 1.15))

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents, each [1, C, 1, 1, 1]."""
        mean, std = (statistic.to(self.runtime.device) for statistic in (self.vae.latents_mean, self.vae.latents_std))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def _pack(self, latents: Tensor) -> Tensor:
        """Return tokens [B, T * H * W, C * patch] of latents [B, C, T, h, w]."""
        config = self.transformer.config
        return pack(latents, config.patch_size_t, config.patch_size)

    def _unpack(self, tokens: Tensor, num_frames: int, height: int, width: int) -> Tensor:
        config = self.transformer.config
        return unpack(tokens, (num_frames, height, width), config.patch_size_t, config.patch_size)


def pack(latents: Tensor, patch_frames: int, patch: int) -> Tensor:
    """Return tokens [B, T * H * W, C * patch_frames * patch * patch] of latents [B, C, t, h, w]."""
    batch, channels, num_frames, height, width = latents.shape
    grid = (num_frames // patch_frames, patch_frames, height // patch, patch, width // patch, patch)
    latents = latents.reshape(batch, channels, *grid)
    # [B, C, T, p_t, H, p, W, p] -> [B, T, H, W, C, p_t, p, p]
    return latents.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpack(tokens: Tensor, size: tuple[int, int, int], patch_frames: int, patch: int) -> Tensor:
    """Return latents [B, C, *size] of tokens: what `pack` was given."""
    num_frames, height, width = size
    grid = (num_frames // patch_frames, height // patch, width // patch)
    latents = tokens.reshape(len(tokens), *grid, -1, patch_frames, patch, patch)
    # [B, T, H, W, C, p_t, p, p] -> [B, C, T, p_t, H, p, W, p]
    return latents.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
