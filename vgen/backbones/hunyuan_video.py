"""HunyuanVideo, from text or from an image, and every checkpoint made of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vgen.backbones import Backbone, Shot
from vgen.backbones.components import (
    component_config,
    decode_or_tile,
    first_frame_channels,
    frames_of,
    load_component,
    load_scheduler,
    model_index,
    pixels_of,
)
from vgen.backbones.hunyuan_video_text import IMAGE_TOKENS, HunyuanText, PromptEncoder, SeeingPromptEncoder
from vgen.backbones.schedulers import FlowScheduler, flow_scheduler, set_straight_timesteps, sigmas_of
from vgen.checkpoints import Checkpoint
from vgen.conditioning.frames import GivenImages, ImageCondition, first_frame
from vgen.conditioning.text import encodable
from vgen.runtime import Runtime

# Every how many image tokens one is read, by how the model takes its image.
INTERLEAVE = {"latent_concat": 2, "token_replace": 4}
# How much of an image-to-video model's start is noise; the rest is the image, in every frame.
START_NOISE = 0.999


class HunyuanVideo(Backbone):
    """A HunyuanVideo checkpoint in diffusers' folder layout, loaded as diffusers loads it.

    The transformer and the text encoders are in the runtime's dtype; the VAE, the latents and the velocities are
    float32. `guidance_scale` is an input of the model where it was distilled to take one. Raises `CheckpointError`
    when a component cannot be loaded.

    An image reaches the model in two ways (`image_condition_type`). With "token_replace" the first latent frame is the
    image's, at timestep 0. With "latent_concat" the image is in channels beside the latents; the model then makes a
    latent frame of its own before the video, which `decode` leaves out.

    Three things are not as in diffusers' pipelines. With "latent_concat" the video has as many frames as are asked
    for, not four fewer. A negative prompt is read with as many image tokens as the prompt, since that is what the two
    velocities are compared at; with "token_replace" diffusers gives it twice as many. And an image of another shape is
    cut, not stretched, before anything sees it.
    """

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime, *, decode_only: bool = False) -> None:
        self.checkpoint = checkpoint
        self.runtime = runtime
        index = model_index(checkpoint)
        self.image_condition_type: str | None = component_config(checkpoint, "transformer").get("image_condition_type")

        def component(name: str, **options: Any) -> Any:
            return load_component(checkpoint, name, index.get(name), **options)

        self.vae = component("vae", torch_dtype=torch.float32).to(runtime.home)
        if decode_only:
            return

        self.scheduler = load_scheduler(checkpoint, index.get("scheduler"))
        self.transformer = component("transformer", torch_dtype=runtime.torch_dtype).to(runtime.home)
        self.tokenizer = component("tokenizer")
        self.text_encoder = component("text_encoder", dtype=runtime.torch_dtype).to(runtime.home)
        self.tokenizer_2 = component("tokenizer_2")
        self.text_encoder_2 = component("text_encoder_2", dtype=runtime.torch_dtype).to(runtime.home)
        self.image_processor = component("image_processor") if self.image_condition_type else None

    def encode_prompt(self, prompts: Sequence[str], images: GivenImages | None = None) -> list[HunyuanText]:
        """Return text per prompt in the transformer's dtype; without an image, an image-to-video model sees black."""
        encoder = self._prompt_encoder(images)
        return [self._encode_prompt(encoder, encodable(prompt)) for prompt in prompts]

    def encode_images(self, images: GivenImages, shot: Shot) -> ImageCondition:
        """Return the first frame as known latents or as channels, and the start that leans on it."""
        assert self.image_condition_type is not None, "a plan with an image was checked against the checkpoint"
        first = self.encode_frames(images.first)
        _, latent_frames, _, _ = self.latent_shape(shot.num_frames, shot.height, shot.width)

        def start(noise: Tensor) -> Tensor:
            return noise * START_NOISE + first * (1 - START_NOISE)

        if self.image_condition_type == "token_replace":
            return ImageCondition(known=first_frame(first, latent_frames), start=start)
        return ImageCondition(inputs=first_frame_channels(first, latent_frames), start=start)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return nothing: a tokenizer of bytes knows every word."""
        return []

    def num_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has, without those of the template around it."""
        return len(self.tokenizer(encodable(prompt), add_special_tokens=False, verbose=False).input_ids)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, T, h, w): for 129 frames of 720 x 1280 pixels (16, 33, 90, 160)."""
        vae = self.vae.config
        latent_frames = (num_frames - 1) // vae.temporal_compression_ratio + 1
        return (
            vae.latent_channels,
            latent_frames + (self.image_condition_type == "latent_concat"),
            height // vae.spatial_compression_ratio,
            width // vae.spatial_compression_ratio,
        )

    def sigmas(self, num_inference_steps: int, shot: Shot) -> Tensor:
        """Return the scheduler's sigmas of a straight line from 1, float32 [N + 1] on the CPU, falling to 0."""
        set_straight_timesteps(self.scheduler, num_inference_steps)
        return sigmas_of(self.scheduler)

    def native_scheduler(self, num_inference_steps: int, shot: Shot) -> FlowScheduler:
        """Return the scheduler itself, in every published checkpoint Euler's."""
        set_straight_timesteps(self.scheduler, num_inference_steps)
        return flow_scheduler(self.checkpoint, self.scheduler, shot.generator)

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        text: HunyuanText,
        known: Tensor | None = None,
        *,
        shot: Shot | None = None,
        image: Tensor | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Return dx/dsigma, float32 [B, C, T, h, w].

        latents [B, C, T, h, w]; sigma []; known: the first latent frame or nothing, as the model itself holds that one
        at timestep 0; image [1, C + 1, T, h, w] beside the latents.
        """
        assert known is None or self.image_condition_type == "token_replace", "the first latent frame alone is given"
        batch, dtype = latents.shape[0], self.transformer.dtype
        guidance = None
        if self.transformer.config.guidance_embeds:
            assert guidance_scale is not None, "a checkpoint whose rules say embedded_guidance"
            guidance = torch.tensor([guidance_scale] * batch, dtype=dtype, device=latents.device) * 1000.0
        if image is not None:
            latents = torch.cat([latents, image.expand(batch, -1, -1, -1, -1)], dim=1)
        velocity: Tensor = self.transformer(
            hidden_states=latents.to(dtype),
            timestep=(sigma * self.scheduler.config.num_train_timesteps).to(latents.device).expand(batch),
            encoder_hidden_states=text.tokens.expand(batch, -1, -1),
            encoder_attention_mask=text.mask.expand(batch, -1),
            pooled_projections=text.pooled.expand(batch, -1),
            guidance=guidance,
            return_dict=False,
        )[0]
        return velocity.float()

    def encode_frames(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the mean latents [B, C, T, h, w] of frames uint8 [B, F, H, W, 3], scaled."""
        pixels = pixels_of(frames.to(self.runtime.device))
        latents: Tensor = self.vae.encode(pixels, return_dict=False)[0].mode() * self.vae.config.scaling_factor
        return latents

    def decode(self, latents: Tensor, shot: Shot | None = None) -> Tensor:
        """Return frames uint8 [B, F, H, W, 3] of latents [B, C, T, h, w]; in tiles where memory does not suffice."""
        pixels = decode_or_tile(self.vae, latents.to(self.vae.dtype) / self.vae.config.scaling_factor)
        before = self.vae.config.temporal_compression_ratio if self.image_condition_type == "latent_concat" else 0
        return frames_of(pixels[:, :, before:])

    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T, H, W): for 129 frames of 720 x 1280 pixels (33, 45, 80)."""
        config = self.transformer.config
        _, latent_frames, latent_height, latent_width = self.latent_shape(num_frames, height, width)
        return (
            latent_frames // config.patch_size_t,
            latent_height // config.patch_size,
            latent_width // config.patch_size,
        )

    def num_text_tokens(self) -> int:
        """Return how many tokens of text and of the image are after the video's, those beyond the prompt masked."""
        length = self.checkpoint.defaults.max_sequence_length
        if self.image_condition_type is None:
            return length
        return length - SeeingPromptEncoder.LEFT_OUT + IMAGE_TOKENS // INTERLEAVE[self.image_condition_type]

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of two streams and then those of one."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def attention_slots(self) -> list[nn.Module]:
        """Return the joint attention of video and text in each of `blocks`."""
        return [block.get_submodule("attn") for block in self.blocks()]

    def _prompt_encoder(self, images: GivenImages | None) -> PromptEncoder | SeeingPromptEncoder:
        length = self.checkpoint.defaults.max_sequence_length
        if self.image_condition_type is None:
            return PromptEncoder(self.tokenizer, self.text_encoder, length)
        picture = np.zeros((64, 64, 3), np.uint8) if images is None else images.first[0, 0].cpu().numpy()
        assert self.image_processor is not None
        pixels = self.image_processor(picture, return_tensors="pt").pixel_values
        interleave = INTERLEAVE[self.image_condition_type]
        return SeeingPromptEncoder(self.tokenizer, self.text_encoder, length, pixels, interleave)

    def _encode_prompt(self, encoder: PromptEncoder | SeeingPromptEncoder, prompt: str) -> HunyuanText:
        tokens, mask = encoder(prompt)
        clip = self.tokenizer_2(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        pooled = self.text_encoder_2(clip.input_ids.to(self.runtime.device)).pooler_output
        dtype = self.transformer.dtype
        return HunyuanText(tokens=tokens.to(dtype), mask=mask, pooled=pooled.to(dtype))
