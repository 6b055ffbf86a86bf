"""Tiny random CogVideoX checkpoints in diffusers' folder layout, made of the real classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import WORDS

TEXT_DIM, TEXT_LENGTH = 24, 16

# As the model cards' repositories have it, but for the shift.
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}


def build(
    folder: Path, *, version: str = "5b", image: bool = False, scheduler: str = "CogVideoXDPMScheduler", seed: int = 0
) -> Path:
    """Write a checkpoint to `folder` and return it; `version` is "2b", "5b" or "1.5", which differ in positions.

    Its native size is 9 frames of 64 x 48 pixels.
    """
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel, schedulers
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8 if image else 4,
        out_channels=4,
        time_embed_dim=8,
        ofs_embed_dim=8 if image and version == "1.5" else None,
        text_embed_dim=TEXT_DIM,
        num_layers=2,
        sample_width=8,
        sample_height=6,
        sample_frames=9,
        patch_size=2,
        patch_size_t=2 if version == "1.5" else None,
        patch_bias=version != "1.5",
        max_text_seq_length=TEXT_LENGTH,
        use_rotary_positional_embeddings=version != "2b",
        use_learned_positional_embeddings=version == "5b" and image,
    )
    with torch.no_grad():  # out of the zeros that would leave prompts without effect
        transformer.proj_out.weight.normal_(std=0.1)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=0.7,
        invert_scale_latents=version == "1.5",
    )
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(WORDS) + 8, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    tokenizer().save_pretrained(folder / "tokenizer")
    getattr(schedulers, scheduler)(**SCHEDULER, snr_shift_scale=1.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "CogVideoXImageToVideoPipeline" if image else "CogVideoXPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def tokenizer():  # type: ignore[no-untyped-def]
    """Return a T5 tokenizer whose pieces are `WORDS`."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(
        vocab=[*special, *((f"▁{word}", -1.0) for word in WORDS)],
        extra_ids=0,
        additional_special_tokens=[],
        model_max_length=TEXT_LENGTH,
    )
