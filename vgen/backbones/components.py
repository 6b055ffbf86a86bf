"""The parts that checkpoints are made of: how they are loaded, and what every VAE shares."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgen import runtime
from vgen.backbones import Backbone, Shot
from vgen.checkpoints import Checkpoint
from vgen.errors import CheckpointError, first_line, is_out_of_memory

logger = logging.getLogger(__name__)

# What a checkpoint may be made of, by the names in model_index.json, in the order in which a run needs it.
MODELS = (
    "text_encoder", "text_encoder_2", "connectors", "image_encoder", "transformer", "transformer_2",
    "vae", "audio_vae", "vocoder",
)  # fmt: skip

# No VAE takes this many times the memory of its latents to decode them: where there is as much, nothing is reckoned.
SURELY_ENOUGH = 20_000


def models_of(backbone: Backbone) -> dict[str, nn.Module]:
    """Return the models that a backbone has loaded, by their names in model_index.json, in the order of a run."""
    found = {name: getattr(backbone, name, None) for name in MODELS}
    return {name: model for name, model in found.items() if isinstance(model, nn.Module)}


def is_transformer(name: str) -> bool:
    """Return whether a name of `models_of` is that of a model that denoises."""
    return name.startswith("transformer")


def transformers_of(backbone: Backbone) -> list[Any]:
    """Return the models of a backbone that denoise: one, or two that share the noise levels."""
    return [model for name, model in models_of(backbone).items() if is_transformer(name)]


def model_index(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what model_index.json says: `[library, class]` per component, and the pipeline's own settings."""
    assert checkpoint.folder is not None, "verified before"
    index: dict[str, Any] = json.loads((checkpoint.folder / "model_index.json").read_text(encoding="utf-8"))
    return index


def component_config(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return the config.json of a component, for what has to be known of one that is not loaded."""
    assert checkpoint.folder is not None, "verified before"
    config: dict[str, Any] = json.loads((checkpoint.folder / name / "config.json").read_text(encoding="utf-8"))
    return config


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own on stderr, which belongs to the caller."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def load_component(checkpoint: Checkpoint, name: str, entry: Any, **options: Any) -> Any:
    """Load what model_index.json names for a component: `[library, class]`; a model where a dtype is among `options`.

    Both libraries import a class's module only when it is asked for, so that this costs what a narrow import does.
    """
    assert checkpoint.folder is not None
    tip = "check that the folder is complete and made by a diffusers that is not newer than this one."
    try:
        library, class_name = entry
        # Besides the two libraries there are the folders of diffusers' pipelines, for classes of one family alone.
        module = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
        component = getattr(importlib.import_module(module), class_name)
        folder = checkpoint.folder / name
        if not options:
            return component.from_pretrained(folder, local_files_only=True)
        streamed = checkpoint.streamed and is_transformer(name)
        with no_progress_bars(), as_streamed(checkpoint, name, options) if streamed else as_quantized(folder):
            model, info = component.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise CheckpointError(f'Cannot load the {name} of "{checkpoint.name}": {reason}', tip=tip) from error
    # Both libraries only log what is missing and go on with random values.
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f'Cannot load the {name} of "{checkpoint.name}": its files lack {len(missing)} weights, the first of them '
            f"{missing[0]}.",
            tip=tip,
        )
    if any("to_gate_compress" in key for key in info["unexpected_keys"]):
        raise CheckpointError(
            f'The {name} of "{checkpoint.name}" was trained with sparse attention (VSA), which vgen lacks: without it '
            "the model is another one.",
            tip="use a student with full attention, such as fastwan2.2-5b.",
        )
    if checkpoint.loras:
        from vgen.backbones import lora

        lora.merge(model, checkpoint, name)
    return model.eval()


@contextmanager
def as_quantized(folder: Path) -> Iterator[None]:
    """Let diffusers load a component's folder where vgen has quantized it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    if config.get("quant_method") != "vgen" and "vgen" not in config:
        yield
        return
    from vgen.quantization import loading

    with loading.known(config["quant_method"]):
        yield


@contextmanager
def as_streamed(checkpoint: Checkpoint, name: str, options: dict[str, Any]) -> Iterator[None]:
    """Let diffusers leave the linear layers of a transformer's blocks on the disk; adds to the options of loading."""
    from vgen.quantization import layers, loading, streaming

    files = layers.files(checkpoint, name)
    options["quantization_config"] = streaming.StreamingConfig(files=files, dtype=options["torch_dtype"])
    with loading.registered(loading.Method.STREAMED, streaming.StreamingQuantizer, {}):
        yield


def load_scheduler(checkpoint: Checkpoint, entry: Any) -> Any:
    """Load the scheduler, with the shift of its flow's schedule that the checkpoint's defaults tell, if any."""
    scheduler = load_component(checkpoint, "scheduler", entry)
    shift = checkpoint.defaults.shift
    if shift is None:
        return scheduler
    name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
    return type(scheduler).from_config(scheduler.config, **{name: shift})


def normal_noise(shape: tuple[int, ...], shot: Shot, device: str) -> Tensor:
    """Return noise float32 [1, *shape], drawn on the CPU, so that a seed means the same on every device."""
    return torch.randn((1, *shape), generator=shot.generator).to(device)


def first_frame_channels(first: Tensor, num_latent_frames: int) -> Tensor:
    """Return a first frame's latents [1, C, 1, h, w] as channels [1, C + 1, T, h, w], the last 1 where given."""
    given = torch.cat([first, torch.ones_like(first[:, :1])], dim=1)
    channels = given.new_zeros(*given.shape[:2], num_latent_frames, *given.shape[3:])
    channels[:, :, :1] = given
    return channels


def pixels_of(frames: Tensor) -> Tensor:
    """Return frames uint8 [B, F, H, W, 3] as pixels float32 [B, 3, F, H, W] from -1 to 1."""
    return frames.permute(0, 4, 1, 2, 3).float() / 255 * 2 - 1


def frames_of(pixels: Tensor) -> Tensor:
    """Return pixels [B, 3, F, H, W] from -1 to 1 as frames uint8 [B, F, H, W, 3]."""
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


def decode_or_tile(vae: Any, latents: Tensor, *inputs: Any) -> Tensor:
    """Return the pixels [B, 3, F, H, W] of a VAE's own latents; in tiles where memory does not suffice.

    `inputs` are what else its decoder takes. A GPU says when its memory is used up; the main memory does not before
    the system ends the process, so that what decoding would take of it is reckoned first.
    """

    def decode() -> Tensor:
        pixels: Tensor = vae.decode(latents, *inputs, return_dict=False)[0]
        return pixels

    if latents.device.type == "cpu" and not vae.use_tiling and _is_too_large(latents, decode):
        _tile(vae)
    try:
        return decode()
    except (RuntimeError, MemoryError) as error:
        if vae.use_tiling or not is_out_of_memory(error):
            raise
    _tile(vae)
    torch.cuda.empty_cache()
    return decode()


def _is_too_large(latents: Tensor, decode: Callable[[], Tensor]) -> bool:
    """Return whether the main memory that is free does not suffice to decode latents on the CPU in one piece."""
    free = runtime.memory("cpu").free
    if latents.nbytes * SURELY_ENOUGH <= free:
        return False
    from vgen.backbones.footprint import peak_bytes

    return peak_bytes(decode) > free


def _tile(vae: Any) -> None:
    logger.warning("Not enough memory to decode in one piece: decoding in tiles.")
    if hasattr(vae, "clear_cache"):
        vae.clear_cache()
    vae.enable_tiling()
