"""A VAE and a base run → a checkpoint in diffusers' folder layout that stock `WanPipeline` loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from vgen import checkpoints
from vgen.toyland import text
from vgen.training.base import STATISTICS, load_run

NAME = "toyland"  # in the configs, in place of the folder that a run had on its machine
SHIFT = 5.0  # of the sigmas at generation: much of the way where there is much noise, as in training


def export_checkpoint(vae: Path, base: Path, folder: Path, *, weights: Path | None = None) -> None:
    """Write the checkpoint of a VAE's folder and a base run's folder; weights are safetensors in bfloat16.

    Its card says of it what the catalogue says of the embedded checkpoint, sizes and defaults above all.
    `weights` are others of the run than its last ones: a folder in its history.
    """
    codec = AutoencoderKLWan.from_pretrained(vae)
    codec.register_to_config(**json.loads((base / STATISTICS).read_text()), _name_or_path=NAME)
    codec.to(torch.bfloat16).save_pretrained(folder / "vae")
    model = load_run(weights or base)
    model.transformer.register_to_config(_name_or_path=NAME)
    model.transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    model.text_encoder.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    text.tokenizer().save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": codec.config["_diffusers_version"],
        "boundary_ratio": None,
        "expand_timesteps": True,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    checkpoints.write_card(folder, checkpoints.resolve(NAME))
