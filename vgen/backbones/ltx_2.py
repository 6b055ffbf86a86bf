"""LTX-2: video and its sound track from one transformer, from text or from a first image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vgen.backbones import Backbone, Shot
from vgen.backbones.components import decode_or_tile, frames_of, load_component, load_scheduler, model_index, pixels_of
from vgen.backbones.ltx_video import pack, unpack
from vgen.backbones.schedulers import FlowScheduler, flow_scheduler, set_shifted_timesteps, sigmas_of
from vgen.checkpoints import Checkpoint
from vgen.conditioning.frames import GivenImages, ImageCondition, first_frame
from vgen.conditioning.text import encodable, num_tokens, unknown_words
from vgen.runtime import Runtime

if TYPE_CHECKING:
    from vgen.video import Sound


@dataclass(frozen=True, kw_only=True)
class Text:
    """A prompt as each half of the transformer reads it, [1, L, D], and which tokens count, [1, L]."""

    video: Tensor
    audio: Tensor
    mask: Tensor


class LTX2(Backbone):
    """An LTX-2 checkpoint in diffusers' folder layout, loaded as diffusers loads it.

    **Two kinds of latents, one loop.** The transformer denoises video latents and audio tokens together, at the same
    sigma. Both are in one tensor [B, C, T + A, h, w]: the video's T latent frames, then the audio's numbers in as many
    further frames as they fill, zero in what is left of the last. So samplers, guidance, known frames, saved latents
    and the native scheduler, all of which treat numbers alike, need not know of sound. T and the number of audio
    tokens follow from the shot's length and frame rate, which is why `decode` is told the shot. Noise is drawn for the
    video first, then for the audio; the velocity of the zeros is zero.

    Transformer, connectors and text encoder are in the runtime's dtype; both VAEs, the vocoder, latents and velocities
    are float32. Of the stock pipeline, whose defaults are LTX-2.3's, this is not reproduced:

    * guidance that needs more runs of the model at each step (`stg_scale`, `modality_scale`), a scale of its own for
      audio, and `guidance_rescale`. The results are those of the stock pipeline with the first two off, one guidance
      scale for both, and no rescaling;
    * `use_cross_timestep` for a checkpoint of LTX-2.0, which was trained without it. It matters with a
      first image only;
    * compressing a first image with H.264 before it is encoded (`image_crf`): the image is taken as it is;
    * prompt enhancement and durations predicted from the prompt, as a request here says both.

    Raises `CheckpointError` when a component cannot be loaded.
    """

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime, *, decode_only: bool = False) -> None:
        self.checkpoint = checkpoint
        self.runtime = runtime
        index = model_index(checkpoint)

        def component(name: str, **options: Any) -> Any:
            return load_component(checkpoint, name, index.get(name), **options)

        self.vae = component("vae", torch_dtype=torch.float32).to(runtime.home)
        self.audio_vae = component("audio_vae", torch_dtype=torch.float32).to(runtime.home)
        self.vocoder = component("vocoder", torch_dtype=torch.float32).to(runtime.home)
        if decode_only:
            return

        self.tokenizer = component("tokenizer")
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.scheduler = load_scheduler(checkpoint, index.get("scheduler"))
        self.text_encoder = component("text_encoder", dtype=runtime.torch_dtype).to(runtime.home)
        self.connectors = component("connectors", torch_dtype=runtime.torch_dtype).to(runtime.home)
        self.transformer = component("transformer", torch_dtype=runtime.torch_dtype).to(runtime.home)

    def encode_prompt(self, prompts: Sequence[str], images: GivenImages | None = None) -> list[Text]:
        """Return each prompt as the connectors make it out of all layers of the text encoder."""
        texts = []
        for prompt in prompts:
            tokens = self.tokenizer(
                [encodable(prompt).strip()],
                padding="max_length",
                max_length=self.checkpoint.defaults.max_sequence_length,
                truncation=True,
                add_special_tokens=True,
                return_tensors="pt",
            ).to(self.runtime.device)
            # The logits, of which the last is the least that can be asked for, are not needed.
            layers = self.text_encoder(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                output_hidden_states=True,
                logits_to_keep=1,
            ).hidden_states
            stacked = torch.stack(layers, dim=-1).flatten(2, 3).to(self.connectors.dtype)
            video, audio, mask = self.connectors(stacked, tokens.attention_mask, padding_side="left")
            texts.append(Text(video=video, audio=audio, mask=mask))
        return texts

    def encode_images(self, images: GivenImages, shot: Shot) -> ImageCondition:
        """Return the first image as known latents."""
        num_frames = self._num_latent_frames(shot) + self._num_audio_frames(shot)
        return ImageCondition(known=first_frame(self.encode_frames(images.first), num_frames))

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that become the tokenizer's unknown token, each once, in order."""
        return unknown_words(self.tokenizer, encodable(prompt))

    def num_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has, with the one it begins with."""
        return num_tokens(self.tokenizer, encodable(prompt).strip())

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, T, h, w) of the video alone: for 121 frames of 512 x 768 pixels (128, 16, 16, 24)."""
        spatial = self.vae.spatial_compression_ratio
        num_latent_frames = (num_frames - 1) // self.vae.temporal_compression_ratio + 1
        return self.vae.config.latent_channels, num_latent_frames, height // spatial, width // spatial

    def noise(self, shot: Shot) -> Tensor:
        """Return noise float32 [1, C, T + A, h, w]."""
        video = torch.randn(
            (1, *self.latent_shape(shot.num_frames, shot.height, shot.width)), generator=shot.generator
        )
        channels, length, bins = self._audio_shape(shot)
        audio = torch.randn((1, channels, length, bins), generator=shot.generator)
        return self._join(video, audio.transpose(1, 2).flatten(2)).to(self.runtime.device)

    def sigmas(self, num_inference_steps: int, shot: Shot) -> Tensor:
        """Return the scheduler's sigmas, float32 [N + 1] on the CPU, larger the more video tokens the shot has."""
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
        """Return dx/dsigma, float32 [B, C, T + A, h, w].

        latents [B, C, T + A, h, w]; sigma []; known bool, broadcast to [B, 1, T + A, h, w]: where it is true, the
        timestep of the video token is 0. Audio is never known.
        """
        config = self.transformer.config
        video, audio = self._split(latents, shot)
        batch, _, num_frames, height, width = video.shape
        timestep = (sigma * self.scheduler.config.num_train_timesteps).to(latents.device).expand(batch)
        video_timestep = timestep
        if known is not None:
            tokens = known.expand(batch, 1, *latents.shape[2:])[:, :, :num_frames].float()
            video_timestep = timestep[:, None] * (1 - pack(tokens, config.patch_size_t, config.patch_size)[..., 0])
        mask = text.mask.expand(batch, -1)
        video_velocity, audio_velocity = self.transformer(
            hidden_states=pack(video, config.patch_size_t, config.patch_size).to(self.transformer.dtype),
            audio_hidden_states=audio.to(self.transformer.dtype),
            encoder_hidden_states=text.video.expand(batch, -1, -1),
            audio_encoder_hidden_states=text.audio.expand(batch, -1, -1),
            timestep=video_timestep,
            audio_timestep=timestep,
            sigma=timestep,
            encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask,
            num_frames=num_frames,
            height=height,
            width=width,
            fps=shot.fps,
            audio_num_frames=audio.shape[1],
            use_cross_timestep=bool(config.cross_attn_mod),
            return_dict=False,
        )
        size = (num_frames, height, width)
        return self._join(
            unpack(video_velocity.float(), size, config.patch_size_t, config.patch_size), audio_velocity.float()
        )

    def encode_frames(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the mean video latents [B, C, T, h, w] of frames uint8 [B, F, H, W, 3], normalised per channel."""
        latents = self.vae.encode(pixels_of(frames.to(self.runtime.device)), return_dict=False)[0].mode()
        mean, std = self._statistics()
        normalised: Tensor = (latents.float() - mean) / std
        return normalised

    def decode(self, latents: Tensor, shot: Shot) -> Tensor:
        """Return frames uint8 [B, F, H, W, 3] of latents [B, C, T + A, h, w]; in tiles where memory is scarce."""
        video, _ = self._split(latents, shot)
        mean, std = self._statistics()
        video = (video * std / self.vae.config.scaling_factor + mean).to(self.vae.dtype)
        timestep = video.new_zeros(video.shape[0]) if self.vae.config.timestep_conditioning else None
        return frames_of(decode_or_tile(self.vae, video, timestep))

    def decode_sound(self, latents: Tensor, shot: Shot) -> Sound:
        """Return the sound of latents [1, C, T + A, h, w]: a spectrogram by the VAE, a waveform by the vocoder."""
        from vgen.video import Sound

        _, audio = self._split(latents, shot)
        channels, _, bins = self._audio_shape(shot)
        mean, std = (value.to(audio.device) for value in (self.audio_vae.latents_mean, self.audio_vae.latents_std))
        audio = audio * std + mean
        audio = audio.view(1, -1, channels, bins).transpose(1, 2)  # [1, L, C * M] -> [1, C, L, M]
        spectrogram = self.audio_vae.decode(audio.to(self.audio_vae.dtype), return_dict=False)[0]
        waveform = self.vocoder(spectrogram)[0].float().clamp(-1, 1).cpu().numpy()
        return Sound(waveform=waveform, sampling_rate=self.vocoder.config.output_sampling_rate)

    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T, H, W) of the video: for 121 frames of 512 x 768 pixels (16, 16, 24)."""
        _, num_latent_frames, latent_height, latent_width = self.latent_shape(num_frames, height, width)
        config = self.transformer.config
        patch = config.patch_size
        return num_latent_frames // config.patch_size_t, latent_height // patch, latent_width // patch

    def blocks(self) -> list[nn.Module]:
        """Return the transformer's blocks, each of which has a half for video and one for audio."""
        return list(self.transformer.transformer_blocks)

    def attention_slots(self) -> list[nn.Module]:
        """Return the self-attention of the video in each of `blocks`; that of the audio has few tokens."""
        return [block.attn1 for block in self.transformer.transformer_blocks]

    def _set_timesteps(self, num_inference_steps: int, shot: Shot) -> None:
        frames, rows, columns = self.token_grid(shot.num_frames, shot.height, shot.width)
        # Where the configuration is silent, the stock pipeline's line.
        set_shifted_timesteps(
            self.scheduler, num_inference_steps, frames * rows * columns, base=(1024, 0.95), most=(4096, 2.05)
        )

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the video latents, each [1, C, 1, 1, 1]."""
        mean, std = (statistic.to(self.runtime.device) for statistic in (self.vae.latents_mean, self.vae.latents_std))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def _num_latent_frames(self, shot: Shot) -> int:
        return self.latent_shape(shot.num_frames, shot.height, shot.width)[1]

    def _audio_shape(self, shot: Shot) -> tuple[int, int, int]:
        """Return (C, L, M): channels, latent spectra, and bins in each, of audio as long as the video."""
        config = self.audio_vae.config
        spectra_per_second = config.sample_rate / config.mel_hop_length / self.audio_vae.temporal_compression_ratio
        length = round(shot.num_frames / shot.fps * spectra_per_second)
        return config.latent_channels, length, config.mel_bins // self.audio_vae.mel_compression_ratio

    def _num_audio_frames(self, shot: Shot) -> int:
        """Return A, how many latent frames the audio's numbers fill."""
        channels, _, height, width = self.latent_shape(shot.num_frames, shot.height, shot.width)
        return math.ceil(math.prod(self._audio_shape(shot)) / (channels * height * width))

    def _join(self, video: Tensor, audio: Tensor) -> Tensor:
        """Return [B, C, T + A, h, w] of video [B, C, T, h, w] and audio tokens [B, L, D]."""
        batch, channels, _, height, width = video.shape
        numbers = audio.flatten(1)
        frame = channels * height * width
        numbers = nn.functional.pad(numbers, (0, -numbers.shape[1] % frame))
        return torch.cat([video, numbers.view(batch, -1, channels, height, width).movedim(1, 2)], dim=2)

    def _split(self, latents: Tensor, shot: Shot) -> tuple[Tensor, Tensor]:
        """Return video [B, C, T, h, w] and audio tokens [B, L, D]: what `_join` was given."""
        num_frames = self._num_latent_frames(shot)
        channels, length, bins = self._audio_shape(shot)
        numbers = latents[:, :, num_frames:].movedim(2, 1).flatten(1)[:, : channels * length * bins]
        return latents[:, :, :num_frames], numbers.view(-1, length, channels * bins)
