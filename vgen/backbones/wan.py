"""Wan 2.1 and 2.2, from text, from images or from both, and every checkpoint made of its classes."""

from __future__ import annotations

from collections.abc import Sequence
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
from vgen.backbones.schedulers import FlowScheduler, flow_scheduler, sigmas_of
from vgen.backbones.wan_image import WanImageInputs, given_channels, grey_video
from vgen.checkpoints import Checkpoint
from vgen.conditioning.frames import GivenImages, ImageCondition, first_frame
from vgen.conditioning.text import clean_prompt, num_tokens, unknown_words
from vgen.runtime import Runtime


class Wan(Backbone):
    """A Wan checkpoint in diffusers' folder layout, loaded as diffusers loads it.

    The transformer and the text encoder are in the runtime's dtype, less the parts that the model keeps in float32;
    the VAE, the latents and the velocities are float32. Raises `CheckpointError` when a component cannot be loaded.

    Two things are not as in diffusers' pipelines. An image of another shape is cut, not stretched, and its encoder
    sees what is left of it, so that encoder and VAE see the same picture. And the image encoder is in float32 at any
    dtype of the others.
    """

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime, *, decode_only: bool = False) -> None:
        self.checkpoint = checkpoint
        self.runtime = runtime
        index = model_index(checkpoint)

        def component(name: str, **options: Any) -> Any:
            return load_component(checkpoint, name, index.get(name), **options)

        # The VAE stays in float32: bfloat16 would be faster, and change frames by whole levels.
        self.vae = component("vae", torch_dtype=torch.float32).to(runtime.home)
        config = self.vae.config
        self._latents_mean = torch.tensor(config.latents_mean, device=runtime.device).view(1, -1, 1, 1, 1)
        self._latents_scale = 1.0 / torch.tensor(config.latents_std, device=runtime.device).view(1, -1, 1, 1, 1)
        if decode_only:
            return

        self.tokenizer = component("tokenizer")
        self.scheduler = load_scheduler(checkpoint, index.get("scheduler"))
        self.text_encoder = component("text_encoder", dtype=runtime.torch_dtype).to(runtime.home)
        self.transformer = component("transformer", torch_dtype=runtime.torch_dtype).to(runtime.home)
        # Wan 2.2's second transformer takes over where the noise falls below `boundary_ratio`.
        self.transformer_2 = None
        if index.get("transformer_2", [None])[0]:
            self.transformer_2 = component("transformer_2", torch_dtype=runtime.torch_dtype).to(runtime.home)
        self.boundary_ratio: float | None = index.get("boundary_ratio")
        self.expand_timesteps = bool(index.get("expand_timesteps", False))
        self.image_encoder = None
        if self.transformer.config.image_dim is not None:
            self.image_processor = component("image_processor")
            self.image_encoder = component("image_encoder", dtype=torch.float32).to(runtime.home)

        # Schedulers of the UniPC kind hand the model whole timesteps; few-step students know theirs as listed.
        self.scheduler.set_timesteps(2)
        is_student = bool(checkpoint.defaults.timesteps)
        self._whole_timesteps = not is_student and not self.scheduler.timesteps.is_floating_point()

    def encode_prompt(self, prompts: Sequence[str], images: GivenImages | None = None) -> list[Tensor]:
        """Return text [1, L, D] per prompt in the transformer's dtype, zero beyond its tokens: Wan attends there."""
        length = self.checkpoint.defaults.max_sequence_length
        tokens = self.tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            max_length=length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.runtime.device)
        text = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        text = text.masked_fill(tokens.attention_mask[..., None] == 0, 0)
        return list(text.to(self.transformer.dtype).split(1))

    def encode_images(self, images: GivenImages, shot: Shot) -> ImageCondition:
        """Return known latents for a model with a timestep per token, and inputs of `velocity` for any other."""
        if self.expand_timesteps:
            num_latent_frames = self.latent_shape(shot.num_frames, shot.height, shot.width)[1]
            return ImageCondition(known=first_frame(self.encode_frames(images.first), num_latent_frames))
        latents = self._encode(grey_video(images, shot.num_frames).to(self.runtime.device))
        given = given_channels(images, shot.num_frames, latents, self.vae.config.scale_factor_temporal)
        inputs = WanImageInputs(channels=torch.cat([given, latents], dim=1), embeddings=self._embed(images))
        return ImageCondition(inputs=inputs)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that become the tokenizer's unknown token, each once, in order."""
        return unknown_words(self.tokenizer, clean_prompt(prompt))

    def num_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has, with the end token where the tokenizer adds one."""
        return num_tokens(self.tokenizer, clean_prompt(prompt))

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, T, h, w): for 17 frames of 128 x 128 pixels (16, 5, 16, 16)."""
        vae = self.vae.config
        return (
            vae.z_dim,
            (num_frames - 1) // vae.scale_factor_temporal + 1,
            height // vae.scale_factor_spatial,
            width // vae.scale_factor_spatial,
        )

    def sigmas(self, num_inference_steps: int, shot: Shot | None = None) -> Tensor:
        """Return the scheduler's own sigmas, float32 [N + 1] on the CPU, falling to 0."""
        self.scheduler.set_timesteps(num_inference_steps)
        return sigmas_of(self.scheduler)

    def native_scheduler(self, num_inference_steps: int, shot: Shot) -> FlowScheduler:
        """Return the scheduler itself, often UniPC."""
        self.scheduler.set_timesteps(num_inference_steps)
        return flow_scheduler(self.checkpoint, self.scheduler, shot.generator)

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        text: Tensor,
        known: Tensor | None = None,
        *,
        shot: Shot | None = None,
        image: WanImageInputs | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Return dx/dsigma, float32 [B, C, T, h, w].

        latents [B, C, T, h, w]; sigma []; text [B, L, D]; known bool, broadcast to [B, 1, T, h, w]: where it is true
        the latents are given, and where all of a token's are the timestep is 0 (per-token timesteps, as Wan 2.2
        TI2V's; without anything known one serves all tokens, for which all is modulated alike); image is what
        `encode_images` gave to an image-to-video model.
        """
        timestep = self._timestep(sigma)
        transformer = self.transformer
        if self.transformer_2 is not None and self.is_below_boundary(sigma):
            transformer = self.transformer_2
        batch = latents.shape[0]
        if image is not None:
            latents = torch.cat([latents, image.channels.expand(batch, -1, -1, -1, -1)], dim=1)
        if known is None:
            timestep = timestep.expand(batch)
        else:
            assert self.expand_timesteps, "a plan with known frames was checked against the checkpoint"
            known = known.expand(batch, 1, *latents.shape[2:])
            # A token is known where all of its cells are.
            patch = transformer.config.patch_size
            noisy = torch.nn.functional.max_pool3d((~known).float(), patch, patch)[:, 0].bool()
            timestep = timestep.where(noisy, 0).flatten(1)
        velocity: Tensor = transformer(
            hidden_states=latents.to(transformer.dtype),
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_hidden_states_image=None if image is None else image.embeddings,
            return_dict=False,
        )[0]
        return velocity.float()

    def is_below_boundary(self, sigma: Tensor) -> bool:
        """Return whether the noise is so little that it is for the second transformer."""
        if self.boundary_ratio is None:
            return False
        return bool(self._timestep(sigma) < self.boundary_ratio * self.scheduler.config.num_train_timesteps)

    def encode_frames(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the mean latents [B, C, T, h, w] of frames uint8 [B, F, H, W, 3], normalised per channel."""
        return self._encode(pixels_of(frames.to(self.runtime.device)))

    def decode(self, latents: Tensor, shot: Shot | None = None) -> Tensor:
        """Return frames uint8 [B, F, H, W, 3] of latents [B, C, T, h, w]; in tiles where memory does not suffice."""
        latents = (latents / self._latents_scale + self._latents_mean).to(self.vae.dtype)
        return frames_of(decode_or_tile(self.vae, latents))

    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T, H, W): for 17 frames of 128 x 128 pixels (5, 8, 8)."""
        _, latent_frames, latent_height, latent_width = self.latent_shape(num_frames, height, width)
        patch_frames, patch_height, patch_width = self.transformer.config.patch_size
        return latent_frames // patch_frames, latent_height // patch_height, latent_width // patch_width

    def blocks(self) -> list[nn.Module]:
        """Return the blocks, those of the second transformer after those of the first."""
        return [block for transformer in self._transformers() for block in transformer.blocks]

    def attention_slots(self) -> list[nn.Module]:
        """Return the self-attention of each of `blocks`."""
        return [block.attn1 for transformer in self._transformers() for block in transformer.blocks]

    def _transformers(self) -> list[Any]:
        return [model for model in (self.transformer, self.transformer_2) if model is not None]

    def _timestep(self, sigma: Tensor) -> Tensor:
        timestep: Tensor = (sigma * self.scheduler.config.num_train_timesteps).to(self.runtime.device)
        # Cut as the scheduler cuts them, in float64: 1e-3 is more than float32 sigmas lose, and less than a step.
        return (timestep + 1e-3).long() if self._whole_timesteps else timestep

    def _embed(self, images: GivenImages) -> Tensor | None:
        """Return the last layer but one of the image encoder, [1 or 2, L, D], one row per image."""
        if self.image_encoder is None:
            return None
        pictures = [frame[0, 0].cpu().numpy() for frame in (images.first, images.last) if frame is not None]
        inputs = self.image_processor(images=pictures, return_tensors="pt").to(self.runtime.device)
        embeddings: Tensor = self.image_encoder(**inputs, output_hidden_states=True).hidden_states[-2]
        return embeddings.to(self.transformer.dtype)

    def _encode(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(pixels.to(self.vae.dtype), return_dict=False)[0].mode().float()
        normalised: Tensor = (latents - self._latents_mean) * self._latents_scale
        return normalised
