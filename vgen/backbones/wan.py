"""Wan 2.x, and every checkpoint made of its classes."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vgen.checkpoints import Checkpoint
from vgen.conditioning.text import clean_prompt
from vgen.errors import CheckpointError
from vgen.runtime import Runtime

logger = logging.getLogger(__name__)


class Wan:
    """A Wan checkpoint in diffusers' folder layout, loaded as diffusers loads it.

    The transformer and the text encoder are in the runtime's dtype, less the parts that the model keeps in float32;
    the VAE, the latents and the velocities are float32. Raises `CheckpointError` when a component cannot be loaded.
    """

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime, *, decode_only: bool = False) -> None:
        self.checkpoint = checkpoint
        self.runtime = runtime
        assert checkpoint.folder is not None, "verified before"
        index = json.loads((checkpoint.folder / "model_index.json").read_text(encoding="utf-8"))

        def component(name: str, **options: Any) -> Any:
            return _load_component(checkpoint, name, index.get(name), **options)

        # The VAE stays in float32: bfloat16 would be faster, and change frames by whole levels.
        self.vae = component("vae", torch_dtype=torch.float32).to(runtime.device)
        config = self.vae.config
        self._latents_mean = torch.tensor(config.latents_mean, device=runtime.device).view(1, -1, 1, 1, 1)
        self._latents_scale = 1.0 / torch.tensor(config.latents_std, device=runtime.device).view(1, -1, 1, 1, 1)
        if decode_only:
            return

        self.tokenizer = component("tokenizer")
        self.scheduler = component("scheduler")
        self.text_encoder = component("text_encoder", dtype=runtime.torch_dtype).to(runtime.device)
        self.transformer = component("transformer", torch_dtype=runtime.torch_dtype).to(runtime.device)
        # Wan 2.2's second transformer takes over where the noise falls below `boundary_ratio`.
        self.transformer_2 = None
        if index.get("transformer_2", [None])[0]:
            self.transformer_2 = component("transformer_2", torch_dtype=runtime.torch_dtype).to(runtime.device)
        self.boundary_ratio: float | None = index.get("boundary_ratio")
        self.expand_timesteps = bool(index.get("expand_timesteps", False))

        # Schedulers of the UniPC kind hand the model whole timesteps.
        self.scheduler.set_timesteps(2)
        self._whole_timesteps = not self.scheduler.timesteps.is_floating_point()

    def encode_prompt(self, prompts: Sequence[str]) -> list[Tensor]:
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

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that become the tokenizer's unknown token, each once, in order."""
        prompt = clean_prompt(prompt)
        unknown = self.tokenizer.unk_token_id
        tokens = self.tokenizer(prompt, return_offsets_mapping=True, verbose=False)
        spans = [span for token, span in zip(tokens.input_ids, tokens.offset_mapping, strict=True) if token == unknown]
        words = (prompt[start:end] for start, end in spans)
        return list(dict.fromkeys(word for word in words if any(character.isalnum() for character in word)))

    def num_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt has, with the end token where the tokenizer adds one."""
        return len(self.tokenizer(clean_prompt(prompt), verbose=False).input_ids)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, T, h, w): for 17 frames of 128 x 128 pixels (16, 5, 16, 16)."""
        vae = self.vae.config
        return (
            vae.z_dim,
            (num_frames - 1) // vae.scale_factor_temporal + 1,
            height // vae.scale_factor_spatial,
            width // vae.scale_factor_spatial,
        )

    def sigmas(self, num_inference_steps: int) -> Tensor:
        """Return the scheduler's own sigmas, float32 [N + 1] on the CPU, falling to 0."""
        self.scheduler.set_timesteps(num_inference_steps)
        sigmas: Tensor = self.scheduler.sigmas
        return sigmas.float().cpu()

    def velocity(self, latents: Tensor, sigma: Tensor, text: Tensor, known: Tensor | None = None) -> Tensor:
        """Return dx/dsigma, float32 [B, C, T, h, w].

        latents [B, C, T, h, w]; sigma []; text [B, L, D]; known bool, broadcast to [B, 1, T, h, w]: where it is true
        the latents are given and the timestep is 0 (per-token timesteps, as Wan 2.2 TI2V's).
        """
        timestep = (sigma * self.scheduler.config.num_train_timesteps).to(self.runtime.device)
        if self._whole_timesteps:
            # Cut as the scheduler cuts them, in float64: 1e-3 is more than float32 sigmas lose, and less than a step.
            timestep = (timestep + 1e-3).long()
        transformer = self.transformer
        if self.boundary_ratio is not None and self.transformer_2 is not None:
            boundary = self.boundary_ratio * self.scheduler.config.num_train_timesteps
            transformer = self.transformer if timestep >= boundary else self.transformer_2
        batch = latents.shape[0]
        if self.expand_timesteps:
            _, patch_height, patch_width = transformer.config.patch_size
            known = torch.zeros((), dtype=torch.bool, device=latents.device) if known is None else known
            known = known.expand(batch, 1, *latents.shape[2:])[:, 0, :, ::patch_height, ::patch_width]
            timestep = timestep.where(~known, 0).flatten(1)
        else:
            assert known is None, "a plan with known frames was checked against the checkpoint"
            timestep = timestep.expand(batch)
        velocity: Tensor = transformer(
            hidden_states=latents.to(transformer.dtype),
            timestep=timestep,
            encoder_hidden_states=text,
            return_dict=False,
        )[0]
        return velocity.float()

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Return the mean latents [B, C, T, h, w] of frames uint8 [B, F, H, W, 3], normalised per channel."""
        pixels = frames.to(self.runtime.device).permute(0, 4, 1, 2, 3).to(self.vae.dtype) / 255 * 2 - 1
        latents: Tensor = self.vae.encode(pixels, return_dict=False)[0].mode().float()
        normalised: Tensor = (latents - self._latents_mean) * self._latents_scale
        return normalised

    def decode(self, latents: Tensor) -> Tensor:
        """Return frames uint8 [B, F, H, W, 3] of latents [B, C, T, h, w]; in tiles where memory does not suffice."""
        latents = (latents / self._latents_scale + self._latents_mean).to(self.vae.dtype)
        pixels: Tensor
        try:
            pixels = self.vae.decode(latents, return_dict=False)[0]
        except torch.OutOfMemoryError:
            logger.warning("Not enough memory to decode in one piece: decoding in tiles.")
            self.vae.clear_cache()
            torch.cuda.empty_cache()
            self.vae.enable_tiling()
            pixels = self.vae.decode(latents, return_dict=False)[0]
        return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own on stderr, which belongs to the caller."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _load_component(checkpoint: Checkpoint, name: str, entry: Any, **options: Any) -> Any:
    """Load what model_index.json names for a component: `[library, class]`; a model where a dtype is among `options`.

    Both libraries import a class's module only when it is asked for, so that this costs what a narrow import does.
    """
    assert checkpoint.folder is not None
    tip = "check that the folder is complete and made by a diffusers that is not newer than this one."
    try:
        library, class_name = entry
        component = getattr(importlib.import_module(library), class_name)
        folder = checkpoint.folder / name
        if not options:
            return component.from_pretrained(folder, local_files_only=True)
        with _no_progress_bars():
            model, info = component.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f'Cannot load the {name} of "{checkpoint.name}": {reason}', tip=tip) from error
    # Both libraries only log what is missing and go on with random values.
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f'Cannot load the {name} of "{checkpoint.name}": its files lack {len(missing)} weights, the first of them '
            f"{missing[0]}.",
            tip=tip,
        )
    return model.eval()
