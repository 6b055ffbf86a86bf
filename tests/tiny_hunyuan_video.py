"""Tiny random HunyuanVideo checkpoints in diffusers' folder layout, made of the real classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import tiny
from vgen.backbones.hunyuan_video_text import IMAGE_TEMPLATE, TEMPLATE

TEXT_DIM = 16
LATENT_CHANNELS = 4
SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")


def build(folder: Path, image_condition_type: str | None = None, *, guidance_embeds: bool = True) -> Path:
    """Write a HunyuanVideo checkpoint of some 10^5 random parameters to `folder` and return it."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=2 * LATENT_CHANNELS + 1 if image_condition_type == "latent_concat" else LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        guidance_embeds=guidance_embeds,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        rope_axes_dim=(4, 4, 4),
        image_condition_type=image_condition_type,
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    text_encoder = llava() if image_condition_type else llama()
    text_encoder_2 = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tiny.WORDS) + 3,
            hidden_size=TEXT_DIM,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    text_encoder_2.save_pretrained(folder / "text_encoder_2")
    tokenizer().save_pretrained(folder / "tokenizer")
    tiny.tokenizer().save_pretrained(folder / "tokenizer_2")
    FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "HunyuanVideoPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", type(text_encoder).__name__],
        "text_encoder_2": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
    }
    if image_condition_type:
        index["_class_name"] = "HunyuanVideoImageToVideoPipeline"
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
        save_image_processor(folder / "image_processor")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def llama_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )


def llama() -> Any:
    """Return a Llama of four layers."""
    from transformers import LlamaModel

    return LlamaModel(llama_config())


def llava() -> Any:
    """Return a Llava whose CLIP makes 24 x 24 tokens of an image of 48 x 48 pixels."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=2
    )
    image_token = tokenizer().convert_tokens_to_ids("<image>")
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=llama_config(),
            image_token_index=image_token,
            pad_token_id=0,
            image_seq_length=576,
        )
    )


def save_image_processor(folder: Path) -> None:
    """Write what makes 48 x 48 pixels of an image for a CLIP."""
    from transformers import CLIPImageProcessor

    CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(folder)


def tokenizer() -> Any:
    """Return a word-level tokenizer that knows the templates' words and `WORDS`, and that begins a text with a token.

    It makes 103 tokens of what is before the prompt in the image template, as the real one does, and 96 of 95 in the
    other.
    """
    import re

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = r"\w+|[^\w\s]+|\n+"
    template = re.sub(r"<\|\w+\|>|<image>", " ", TEMPLATE + IMAGE_TEMPLATE)
    words = dict.fromkeys([*re.findall(pieces, template), "\n", "\n\n", *tiny.WORDS])
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *SPECIAL, *words])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "removed", invert=True)
    fast.add_special_tokens(list(SPECIAL))
    begin = SPECIAL[0]
    fast.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL),
        padding_side="right",
        model_max_length=4096,
    )
