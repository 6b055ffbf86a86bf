"""Tiny random Wan checkpoints that make videos from images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import tiny

IMAGE_DIM = 24
IMAGE_TOKENS = 17


def build(folder: Path, *, encoder: bool = True, both_ends: bool = False, boundary: float | None = None) -> Path:
    """Write an image-to-video checkpoint to `folder` and return it.

    With `encoder` it is as Wan 2.1's, and with `both_ends` as the one of those that takes a last image; without an
    encoder and with a `boundary` as Wan 2.2's, of two transformers.
    """
    import torch
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    tiny.build(folder)
    torch.manual_seed(2)
    config: dict[str, Any] = {**WanTransformer3DModel.load_config(folder / "transformer"), "in_channels": 16 + 4 + 16}
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {"_class_name": "WanImageToVideoPipeline", "image_encoder": [None, None], "image_processor": [None, None]}
    if encoder:
        config |= {"image_dim": IMAGE_DIM, "added_kv_proj_dim": 24}
        config["pos_embed_seq_len"] = 2 * IMAGE_TOKENS if both_ends else None
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
        save_image_encoder(folder)
    parts = ["transformer"] if boundary is None else ["transformer", "transformer_2"]
    index["boundary_ratio"] = boundary
    for part in parts:
        transformer = WanTransformer3DModel.from_config(config)
        with torch.no_grad():
            transformer.proj_out.weight.normal_(std=0.2)
            for name, parameter in transformer.named_parameters():
                if "pos_embed" in name:
                    parameter.normal_()
        transformer.save_pretrained(folder / part)
        index[part] = ["diffusers", "WanTransformer3DModel"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def save_image_encoder(folder: Path) -> None:
    """Write a CLIP that makes 17 tokens of an image of 32 x 32 pixels, and what prepares the image."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    CLIPVisionModel(config).save_pretrained(folder / "image_encoder")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "image_processor"
    )
