"""HunyuanVideo 1.5, from text or from an image, and every checkpoint made of its classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vgen.backbones import Backbone, Shot
from vgen.backbones.components import (
    decode_or_tile,
    first_frame_channels,
    frames_of,
    load_component,
    load_scheduler,
    model_index,
    pixels_of,
)
from vgen.backbones.schedulers import FlowScheduler, flow_scheduler, set_straight_timesteps, sigmas_of
from vgen.checkpoints import Checkpoint
from vgen.conditioning.frames import GivenImages, ImageCondition
from vgen.conditioning.text import encodable
from vgen.runtime import Runtime

# What the model was trained with, to the space; and how many tokens of the conversation come before the prompt.
SYSTEM_MESSAGE = (" " * 9).join(
    (
        "You are a helpful assistant. Describe the video by detailing the following aspects:",
        "1. The main content and theme of the video.",
        "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
        "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
        "4. background environment, light, style and atmosphere.",
        "5. camera angles, movements, and transitions used in the video.",
    )
)
TEMPLATE_TOKENS = 108
# The text is taken from before the last two layers.
LAYER = -3
# How many bytes of what is to be written in the video are read, and the place that is kept for an image.
GLYPH_TOKENS = 256
IMAGE_TOKENS = 729
QUOTED = re.compile(r'"(.*?)"|“(.*?)”')


@dataclass(frozen=True, kw_only=True)
class HunyuanText15:
    """A prompt as the model takes it: what it says and what it wants written, each [1, L, D] with a mask [1, L]."""

    tokens: Tensor
    mask: Tensor
    glyphs: Tensor
    glyph_mask: Tensor


@dataclass(frozen=True, kw_only=True)
class HunyuanImageInputs15:
    """An image as the model takes it: channels [1, C + 1, T, h, w] beside the latents, and embeddings [1, L, D].

    The channels are the image's latents, and 1 where they are given.
    """

    channels: Tensor
    embeddings: Tensor


def glyph_text(prompt: str) -> str:
    """Return what a prompt has in quotes, each once, as the glyph encoder was trained to read it."""
    texts = dict.fromkeys(straight or curly for straight, curly in QUOTED.findall(prompt))
    return "".join(f'Text "{text}". ' for text in texts)


class HunyuanVideo15(Backbone):
    """A HunyuanVideo 1.5 checkpoint in diffusers' folder layout, loaded as diffusers loads it.

    The transformer and the encoders are in the runtime's dtype; the VAE, the latents and the velocities are float32.
    Raises `CheckpointError` when a component cannot be loaded.

    Four things are not as in diffusers' pipelines. The latents are in float32 at any dtype of the transformer. Of the
    checkpoint's guider the scale is taken, as a default, and no other rule of guidance. An image has the size that is
    asked for, not one that is chosen by its shape, and is cut once. And a step-distilled transformer, which is told
    the time that a step ends at, is told the next of the schedule: it is for the sampler euler.
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

        self.scheduler = load_scheduler(checkpoint, index.get("scheduler"))
        self.transformer = component("transformer", torch_dtype=runtime.torch_dtype).to(runtime.home)
        self.tokenizer = component("tokenizer")
        self.text_encoder = component("text_encoder", dtype=runtime.torch_dtype).to(runtime.home)
        self.tokenizer_2 = component("tokenizer_2")
        self.text_encoder_2 = component("text_encoder_2", dtype=runtime.torch_dtype).to(runtime.home)
        self.image_encoder = None
        if index.get("image_encoder", [None])[0]:
            self.image_encoder = component("image_encoder", dtype=runtime.torch_dtype).to(runtime.home)
            self.feature_extractor = component("feature_extractor")

    def encode_prompt(self, prompts: Sequence[str], images: GivenImages | None = None) -> list[HunyuanText15]:
        """Return text per prompt in the transformer's dtype."""
        return [self._encode_prompt(encodable(prompt)) for prompt in prompts]

    def encode_images(self, images: GivenImages, shot: Shot) -> ImageCondition:
        """Return the first frame as channels beside the latents and as embeddings."""
        assert self.image_encoder is not None, "a plan with an image was checked against the checkpoint"
        first = self.encode_frames(images.first)
        _, latent_frames, _, _ = self.latent_shape(shot.num_frames, shot.height, shot.width)
        channels = first_frame_channels(first, latent_frames)
        picture = images.first[0, 0].cpu().numpy()
        pixels = self.feature_extractor(picture, do_resize=True, do_convert_rgb=True, return_tensors="pt").pixel_values
        embeddings = self.image_encoder(pixels.to(self.runtime.device, self.image_encoder.dtype)).last_hidden_state
        return ImageCondition(inputs=HunyuanImageInputs15(channels=channels, embeddings=embeddings))

    def unknown_words(self, prompt: str) -> list[str]:
        """Return nothing: a tokenizer of bytes knows every word."""
        return []

    def num_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has, without those of the conversation around it."""
        return len(self.tokenizer(encodable(prompt), add_special_tokens=False, verbose=False).input_ids)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, T, h, w): for 121 frames of 480 x 848 pixels (32, 31, 30, 53)."""
        vae = self.vae.config
        return (
            vae.latent_channels,
            (num_frames - 1) // vae.temporal_compression_ratio + 1,
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
        text: HunyuanText15,
        known: Tensor | None = None,
        *,
        shot: Shot | None = None,
        image: HunyuanImageInputs15 | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Return dx/dsigma, float32 [B, C, T, h, w].

        latents [B, C, T, h, w]; sigma []. Without an image the model takes zeros for it, and masks its tokens.
        """
        assert known is None, "a plan with known frames was checked against the checkpoint"
        batch, dtype = latents.shape[0], self.transformer.dtype
        if image is None:
            channels = torch.zeros_like(latents[:1, :1]).expand(batch, latents.shape[1] + 1, -1, -1, -1)
            embeddings = latents.new_zeros(batch, IMAGE_TOKENS, self.transformer.config.image_embed_dim)
        else:
            channels = image.channels.expand(batch, -1, -1, -1, -1)
            embeddings = image.embeddings.expand(batch, -1, -1)
        end = None
        if image is not None and self.transformer.config.use_meanflow:
            end = self._timestep(self._next_sigma(sigma), batch)
        velocity: Tensor = self.transformer(
            hidden_states=torch.cat([latents, channels], dim=1).to(dtype),
            timestep=self._timestep(sigma, batch),
            timestep_r=end,
            encoder_hidden_states=text.tokens.expand(batch, -1, -1),
            encoder_attention_mask=text.mask.expand(batch, -1),
            encoder_hidden_states_2=text.glyphs.expand(batch, -1, -1),
            encoder_attention_mask_2=text.glyph_mask.expand(batch, -1),
            image_embeds=embeddings.to(dtype),
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
        return frames_of(decode_or_tile(self.vae, latents.to(self.vae.dtype) / self.vae.config.scaling_factor))

    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T, H, W): for 121 frames of 480 x 848 pixels (31, 30, 53)."""
        config = self.transformer.config
        _, latent_frames, latent_height, latent_width = self.latent_shape(num_frames, height, width)
        return (
            latent_frames // config.patch_size_t,
            latent_height // config.patch_size,
            latent_width // config.patch_size,
        )

    def num_text_tokens(self) -> int:
        """Return how many tokens of image, glyphs and text are after the video's, with those that are masked."""
        image_tokens = IMAGE_TOKENS
        if self.image_encoder is not None:
            vision = self.image_encoder.config
            image_tokens = (vision.image_size // vision.patch_size) ** 2
        return image_tokens + GLYPH_TOKENS + self.checkpoint.defaults.max_sequence_length

    def blocks(self) -> list[nn.Module]:
        """Return the blocks, all of two streams."""
        return list(self.transformer.transformer_blocks)

    def attention_slots(self) -> list[nn.Module]:
        """Return the joint attention of video and text in each of `blocks`."""
        return [block.get_submodule("attn") for block in self.blocks()]

    def _timestep(self, sigma: Tensor, batch: int) -> Tensor:
        timestep: Tensor = (sigma * self.scheduler.config.num_train_timesteps).to(self.runtime.device)
        return timestep.expand(batch).to(self.transformer.dtype)

    def _next_sigma(self, sigma: Tensor) -> Tensor:
        """Return where in the schedule that was asked for last a step from `sigma` ends."""
        sigmas: Tensor = self.scheduler.sigmas
        later = sigmas[sigmas < sigma.to(sigmas.device)]
        return later[0] if len(later) else torch.zeros_like(sigma)

    def _encode_prompt(self, prompt: str) -> HunyuanText15:
        dtype = self.transformer.dtype
        tokens, mask = self._read(prompt)
        glyphs, glyph_mask = self._read_glyphs(prompt)
        return HunyuanText15(tokens=tokens.to(dtype), mask=mask, glyphs=glyphs.to(dtype), glyph_mask=glyph_mask)

    def _read(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Return the tokens [1, L, D] of a prompt in a conversation, and the mask of what is not padding."""
        conversation = [
            {"role": "system", "content": SYSTEM_MESSAGE},
            {"role": "user", "content": prompt or " "},
        ]
        tokens = self.tokenizer.apply_chat_template(
            [conversation],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            padding="max_length",
            max_length=TEMPLATE_TOKENS + self.checkpoint.defaults.max_sequence_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.runtime.device)
        hidden = self.text_encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
        ).hidden_states[LAYER]
        return hidden[:, TEMPLATE_TOKENS:], tokens.attention_mask[:, TEMPLATE_TOKENS:]

    def _read_glyphs(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Return the bytes [1, 256, D] of what is to be written, and their mask, all padding where nothing is."""
        written = glyph_text(prompt)
        if not written:
            glyphs = torch.zeros(1, GLYPH_TOKENS, self.text_encoder_2.config.d_model, device=self.runtime.device)
            return glyphs, torch.zeros(1, GLYPH_TOKENS, dtype=torch.int64, device=self.runtime.device)
        tokens = self.tokenizer_2(
            written, padding="max_length", max_length=GLYPH_TOKENS, truncation=True, return_tensors="pt"
        ).to(self.runtime.device)
        glyphs = self.text_encoder_2(tokens.input_ids, attention_mask=tokens.attention_mask.float())[0]
        return glyphs, tokens.attention_mask
