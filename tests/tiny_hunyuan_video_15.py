"""Tiny random HunyuanVideo 1.5 checkpoints in diffusers' folder layout, made of the real classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import tiny_hunyuan_video

TEXT_DIM = 16
IMAGE_DIM = 8
LATENT_CHANNELS = 4
# A conversation as Qwen writes it, with the tokens that it has.
CHAT = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def build(folder: Path, *, image: bool = False, use_meanflow: bool = False) -> Path:
    """Write a HunyuanVideo 1.5 checkpoint of some 10^5 random parameters to `folder` and return it.

    The size that diffusers chooses for a square image is 64 x 64.
    """
    import torch
    from diffusers.guiders import ClassifierFreeGuidance
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import AutoencoderKLHunyuanVideo15
    from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextModel, T5Config, T5EncoderModel
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=2 * LATENT_CHANNELS + 1,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=TEXT_DIM,
        image_embed_dim=IMAGE_DIM,
        rope_axes_dim=(4, 4, 4),
        target_size=64,
        task_type="i2v" if image else "t2v",
        use_meanflow=use_meanflow,
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=LATENT_CHANNELS, block_out_channels=(32, 32, 32, 32, 32), layers_per_block=1
    )
    text_encoder = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=len(tiny_hunyuan_video.tokenizer()),
            hidden_size=TEXT_DIM,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=2,
            eos_token_id=5,
            pad_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(vocab_size=384, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )
    tokenizer = tiny_hunyuan_video.tokenizer()
    tokenizer.chat_template = CHAT
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    text_encoder_2.save_pretrained(folder / "text_encoder_2")
    tokenizer.save_pretrained(folder / "tokenizer")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer_2")
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(folder / "scheduler")
    ClassifierFreeGuidance(guidance_scale=4.0).save_pretrained(folder / "guider")
    index: dict[str, Any] = {
        "_class_name": "HunyuanVideo15Pipeline",
        "_diffusers_version": "0.42.1",
        "guider": ["diffusers", "ClassifierFreeGuidance"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "tokenizer_2": ["transformers", "ByT5Tokenizer"],
        "transformer": ["diffusers", "HunyuanVideo15Transformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLHunyuanVideo15"],
    }
    if image:
        index["_class_name"] = "HunyuanVideo15ImageToVideoPipeline"
        index["image_encoder"] = ["transformers", "SiglipVisionModel"]
        index["feature_extractor"] = ["transformers", "SiglipImageProcessor"]
        save_image_encoder(folder)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def save_image_encoder(folder: Path) -> None:
    """Write a SigLIP that makes 4 x 4 tokens of an image of 32 x 32 pixels, and what prepares the image."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    SiglipVisionModel(config).save_pretrained(folder / "image_encoder")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "feature_extractor")
