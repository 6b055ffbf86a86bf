"""CogVideoX 1.0 and 1.5, text to video and image to video."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgen.backbones import Backbone, Shot
from vgen.backbones.components import decode_or_tile, frames_of, load_component, load_scheduler, model_index, pixels_of
from vgen.backbones.schedulers import step_options
from vgen.checkpoints import Checkpoint
from vgen.conditioning.frames import GivenImages, ImageCondition
from vgen.conditioning.text import encodable, num_tokens, unknown_words
from vgen.errors import CheckpointError
from vgen.runtime import Runtime


class CogVideoX(Backbone):
    """A CogVideoX checkpoint in diffusers' folder layout, loaded as diffusers loads it.

    The model is trained on a variance-preserving diffusion x = alpha * data + beta * noise, alpha^2 + beta^2 = 1, of
    which it predicts v = alpha * noise - beta * data. Divided by alpha + beta, x is a point of a rectified flow:
    with sigma = beta / (alpha + beta), latents = x / (alpha + beta) = (1 - sigma) * data + sigma * noise. So the loop
    has its flow, Euler's steps in it are exactly DDIM's in x, and both agree at sigma 1 and 0.

    Transformer and text encoder are in the runtime's dtype; VAE, latents and velocities are float32. Of the stock
    pipeline this is not reproduced: noise drawn in the text encoder's dtype, and latents rounded to it after every
    step, since both lose what float32 keeps for nothing (in float32 all is equal); and `use_dynamic_cfg`, which is off
    by default. Raises `CheckpointError` when a component cannot be loaded.
    """

    text_comes_first = True

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
        self._check_scheduler()
        self.text_encoder = component("text_encoder", dtype=runtime.torch_dtype).to(runtime.home)
        self.transformer = component("transformer", torch_dtype=runtime.torch_dtype).to(runtime.home)
        # The sigma of each timestep, falling from the last one to the first, for `velocity` to find the timestep of.
        self._sigmas = _sigma(self.scheduler.alphas_cumprod.double()).float().to(runtime.device)

    def encode_prompt(self, prompts: Sequence[str], images: GivenImages | None = None) -> list[Tensor]:
        """Return text [1, L, D] per prompt in the transformer's dtype."""
        tokens = self.tokenizer(
            [encodable(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.num_text_tokens(),
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        # Without a mask, as the model was trained: it attends to the padding.
        text = self.text_encoder(tokens.input_ids.to(self.runtime.device))[0]
        return list(text.to(self.transformer.dtype).split(1))

    def encode_images(self, images: GivenImages, shot: Shot) -> ImageCondition:
        """Return the first image's latents as channels [1, T, C, h, w] beside the noisy ones: zero after it."""
        latents = self.encode_frames(images.first, shot.generator).movedim(1, 2)
        if self.vae.config.invert_scale_latents:
            # CogVideoX 1.5 was trained on image latents that are divided by the factor instead.
            latents = latents / self.vae.config.scaling_factor**2
        padding = self.latent_shape(shot.num_frames, shot.height, shot.width)[1] - 1
        nothing = latents.new_zeros((1, padding, *latents.shape[2:]))
        return ImageCondition(inputs=torch.cat([latents, nothing], dim=1).to(self.transformer.dtype))

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that become the tokenizer's unknown token, each once, in order."""
        return unknown_words(self.tokenizer, encodable(prompt))

    def num_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has, with the end token."""
        return num_tokens(self.tokenizer, encodable(prompt))

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, T, h, w): for 49 frames of 480 x 720 pixels (16, 13, 60, 90).

        In CogVideoX 1.5 one token spans two latent frames, and T is padded to an even number, at the front.
        """
        vae = self.vae.config
        spatial = 2 ** (len(vae.block_out_channels) - 1)
        num_latent_frames = self._num_latent_frames(num_frames)
        num_latent_frames += -num_latent_frames % (self.transformer.config.patch_size_t or 1)
        return vae.latent_channels, num_latent_frames, height // spatial, width // spatial

    def noise(self, shot: Shot) -> Tensor:
        """Return noise float32 [1, C, T, h, w], drawn frame by frame."""
        channels, *rest = self.latent_shape(shot.num_frames, shot.height, shot.width)
        num_latent_frames, height, width = rest
        noise = torch.randn((1, num_latent_frames, channels, height, width), generator=shot.generator)
        return noise.movedim(1, 2).contiguous().to(self.runtime.device)

    def sigmas(self, num_inference_steps: int, shot: Shot) -> Tensor:
        """Return beta / (alpha + beta) at the scheduler's timesteps and then 0, float32 [N + 1] on the CPU."""
        self.scheduler.set_timesteps(num_inference_steps)
        return torch.cat([self._sigmas.cpu()[self.scheduler.timesteps], torch.zeros(1)])

    def native_scheduler(self, num_inference_steps: int, shot: Shot) -> NativeScheduler:
        """Return CogVideoX's own DPM-Solver++ with noise, or DDIM."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps)
        return NativeScheduler(scheduler, shot.generator)

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        text: Tensor,
        known: Tensor | None = None,
        *,
        shot: Shot,
        image: Tensor | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Return dx/dsigma = noise - data, float32 [B, C, T, h, w], of the flow that the class describes.

        latents [B, C, T, h, w]; sigma [], which is taken to the model as the nearest timestep; text [1, L, D].
        """
        assert known is None, "a plan with known frames was checked against the checkpoint"
        sigma = sigma.to(latents.device)
        alpha, beta = _alpha_beta(sigma)
        x = latents * (alpha + beta)
        batch = latents.shape[0]
        hidden_states = x.movedim(1, 2).to(self.transformer.dtype)
        if image is not None:
            hidden_states = torch.cat([hidden_states, image.expand(batch, -1, -1, -1, -1)], dim=2)
        # CogVideoX 1.5 image to video was trained with an "offset" that is always 2.
        ofs = None if self.transformer.config.ofs_embed_dim is None else hidden_states.new_full((1,), 2.0)
        v: Tensor = self.transformer(
            hidden_states=hidden_states,
            encoder_hidden_states=text.expand(batch, -1, -1),
            timestep=(self._sigmas - sigma).abs().argmin().expand(batch),
            ofs=ofs,
            image_rotary_emb=self._rotary(shot),
            return_dict=False,
        )[0]
        v = v.float().movedim(1, 2)
        data, noise = alpha * x - beta * v, alpha * v + beta * x
        return noise - data

    def encode_frames(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return latents [B, C, T, h, w] of frames uint8 [B, F, H, W, 3], drawn from the VAE's posterior."""
        posterior = self.vae.encode(pixels_of(frames.to(self.runtime.device)), return_dict=False)[0]
        latents: Tensor = posterior.mode() if generator is None else posterior.sample(generator)
        scaled: Tensor = latents.float() * self.vae.config.scaling_factor
        return scaled

    def decode(self, latents: Tensor, shot: Shot) -> Tensor:
        """Return frames uint8 [B, F, H, W, 3] of latents [B, C, T, h, w]; in tiles where memory does not suffice."""
        padding = latents.shape[2] - self._num_latent_frames(shot.num_frames)
        latents = latents[:, :, padding:] / self.vae.config.scaling_factor
        return frames_of(decode_or_tile(self.vae, latents.to(self.vae.dtype)))

    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (T, H, W): for 49 frames of 480 x 720 pixels (13, 30, 45)."""
        _, num_latent_frames, latent_height, latent_width = self.latent_shape(num_frames, height, width)
        config = self.transformer.config
        patch = config.patch_size
        return num_latent_frames // (config.patch_size_t or 1), latent_height // patch, latent_width // patch

    def num_text_tokens(self) -> int:
        """Return the length to which every prompt is padded: its tokens are before the video's in self-attention."""
        length: int = self.transformer.config.max_text_seq_length
        return length

    def blocks(self) -> list[nn.Module]:
        """Return the transformer's blocks."""
        return list(self.transformer.transformer_blocks)

    def attention_slots(self) -> list[nn.Module]:
        """Return the joint self-attention of text and video of each of `blocks`."""
        return [block.attn1 for block in self.transformer.transformer_blocks]

    def _num_latent_frames(self, num_frames: int) -> int:
        return int((num_frames - 1) // self.vae.config.temporal_compression_ratio + 1)

    def _rotary(self, shot: Shot) -> tuple[Tensor, Tensor] | None:
        """Return cos and sin [T * H * W, D] of the rotary positions; None for CogVideoX 2B, which adds positions."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        config = self.transformer.config
        if not config.use_rotary_positional_embeddings:
            return None
        frames, rows, columns = self.token_grid(shot.num_frames, shot.height, shot.width)
        base_rows, base_columns = config.sample_height // config.patch_size, config.sample_width // config.patch_size
        options: dict[str, Any] = {"crops_coords": _fitted((rows, columns), (base_rows, base_columns))}
        if config.patch_size_t is not None:
            options = {"crops_coords": None, "grid_type": "slice", "max_size": (base_rows, base_columns)}
        cos, sin = get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            grid_size=(rows, columns),
            temporal_size=frames,
            device=self.runtime.device,
            **options,
        )
        return cos, sin

    def _check_scheduler(self) -> None:
        """Refuse a diffusion that does not go from noise alone to data alone, as no flow does."""
        config = self.scheduler.config
        wanted = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "set_alpha_to_one": True}
        wanted["rescale_betas_zero_snr"] = True
        for key, value in wanted.items():
            if config.get(key) != value:
                raise CheckpointError(
                    f'The scheduler of "{self.checkpoint.name}" has {key} = {config.get(key)!r}, but CogVideoX was '
                    f"trained with {value!r}.",
                    tip="correct scheduler/scheduler_config.json, or get the checkpoint again.",
                )


class NativeScheduler:
    """A scheduler of CogVideoX, which steps x and takes v; see `CogVideoX` for what they are to the flow."""

    def __init__(self, scheduler: Any, generator: torch.Generator) -> None:
        self._scheduler = scheduler
        self._options = step_options(scheduler, generator)
        # The multistep one is told what data it predicted last, and when; DDIM needs neither.
        self._remembers = "old_pred_original_sample" in inspect.signature(scheduler.step).parameters
        self._data: Tensor | None = None
        alphas_cumprod = scheduler.alphas_cumprod.double()
        self._squares = torch.cat([alphas_cumprod[scheduler.timesteps], torch.ones(1, dtype=torch.float64)])

    def step(self, i: int, velocity: Tensor, latents: Tensor) -> Tensor:
        """Return the flow's latents after step i."""
        timesteps = self._scheduler.timesteps
        alpha, beta = (square.sqrt().item() for square in (self._squares[i], 1 - self._squares[i]))
        next_alpha, next_beta = (square.sqrt().item() for square in (self._squares[i + 1], 1 - self._squares[i + 1]))
        sigma = beta / (alpha + beta)
        data, noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
        v, x = alpha * noise - beta * data, latents * (alpha + beta)
        v, x = v.movedim(2, 1), x.movedim(2, 1)  # noise is drawn frame by frame
        if self._remembers:
            last = timesteps[i - 1] if i > 0 else None
            x, self._data = self._scheduler.step(v, self._data, timesteps[i], last, x, **self._options)
        else:
            x = self._scheduler.step(v, timesteps[i], x, **self._options, return_dict=False)[0]
        stepped: Tensor = x.movedim(1, 2) / (next_alpha + next_beta)
        return stepped


def _sigma(square: Tensor) -> Tensor:
    """Return beta / (alpha + beta) for alpha^2 = `square`."""
    alpha, beta = square.sqrt(), (1 - square).sqrt()
    return beta / (alpha + beta)


def _alpha_beta(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and beta, alpha^2 + beta^2 = 1, with beta / (alpha + beta) = sigma."""
    norm = torch.hypot(1 - sigma, sigma)
    return (1 - sigma) / norm, sigma / norm


def _fitted(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (top, left) and (bottom, right) of a grid scaled into the middle of the one that was trained on."""
    (rows, columns), (base_rows, base_columns) = grid, base
    scale = min(base_rows / rows, base_columns / columns)
    height, width = round(rows * scale), round(columns * scale)
    top, left = round((base_rows - height) / 2), round((base_columns - width) / 2)
    return (top, left), (top + height, left + width)
