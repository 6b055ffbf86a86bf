"""Tiny random LTX-2 checkpoints in diffusers' folder layout, made of the real classes."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tests.tiny_ltx_video import SCHEDULER

TEXT_DIM, TEXT_LAYERS, CHANNELS = 16, 2, 8


def build(folder: Path, *, version: str = "2.0", seed: int = 0) -> Path:
    """Write a checkpoint to `folder` and return it; `version` is "2.0" or "2.3", which differ in their connectors.

    VAE 8x in time and 32x in space; 8 channels of latents, and audio tokens of 2 channels and 4 bins.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    torch.manual_seed(seed)
    later = version == "2.3"
    transformer = LTX2VideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=TEXT_DIM,
        rope_type="split",
        gated_attn=later,
        cross_attn_mod=later,
        audio_gated_attn=later,
        audio_cross_attn_mod=later,
        use_prompt_embeddings=not later,
    )
    connectors = LTX2TextConnectors(
        caption_channels=TEXT_DIM,
        text_proj_in_factor=TEXT_LAYERS + 1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=12 if later else TEXT_DIM // 2,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=8,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=TEXT_DIM // 2,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
        connector_rope_base_seq_len=64,
        rope_type="split",
        per_modality_projections=later,
        video_hidden_dim=24,
        audio_hidden_dim=TEXT_DIM,
    )
    vocoder = LTX2Vocoder(
        in_channels=32,
        hidden_channels=16,
        upsample_kernel_sizes=[16, 15],
        upsample_factors=[16, 15],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
        output_sampling_rate=24000,
    )
    components = {
        "transformer": transformer,
        "connectors": connectors,
        "vocoder": vocoder,
        "vae": _vae(),
        "audio_vae": _audio_vae(),
        "text_encoder": _text_encoder(),
        "tokenizer": tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER),
    }
    for name, component in components.items():
        component.save_pretrained(folder / name)
    index = {
        "_class_name": "LTX2Pipeline",
        "_diffusers_version": "0.42.1",
        "audio_vae": ["diffusers", "AutoencoderKLLTX2Audio"],
        "connectors": ["ltx2", "LTX2TextConnectors"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Gemma3ForConditionalGeneration"],
        "tokenizer": ["transformers", "GemmaTokenizer"],
        "transformer": ["diffusers", "LTX2VideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLLTX2Video"],
        "vocoder": ["ltx2", "LTX2Vocoder"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def _vae():  # type: ignore[no-untyped-def]
    import torch
    from diffusers import AutoencoderKLLTX2Video

    vae = AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        upsample_residual=(False,) * 3,
        upsample_factor=(1, 1, 1),
        patch_size=4,
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, CHANNELS))
    vae.latents_std.copy_(torch.linspace(0.5, 1.5, CHANNELS))
    return vae


def _audio_vae():  # type: ignore[no-untyped-def]
    import torch
    from diffusers import AutoencoderKLLTX2Audio

    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=16, resolution=16
    )
    audio_vae.latents_mean.copy_(torch.linspace(-0.4, 0.6, 8))
    audio_vae.latents_std.copy_(torch.linspace(1.5, 0.5, 8))
    return audio_vae


def _text_encoder():  # type: ignore[no-untyped-def]
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={
                "vocab_size": 64,
                "hidden_size": TEXT_DIM,
                "intermediate_size": 24,
                "num_hidden_layers": TEXT_LAYERS,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "sliding_window": 16,
            },
            vision_config={
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            mm_tokens_per_image=4,
            image_token_id=60,
            boi_token_index=61,
            eoi_token_index=62,
        )
    )


def tokenizer():  # type: ignore[no-untyped-def]
    """Return a Gemma tokenizer whose tokens are small letters."""
    from transformers import GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=1024)
