from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanVideo15Transformer3DModel
from PIL import Image

from tests import tiny_hunyuan_video_15
from tests.parity import (
    TOLERANCE,
    Lengths,
    difference,
    loaded,
    num_parameters,
    on_meta,
    planned,
    reinstall,
    shot_of,
)
from vgen.backbones.hunyuan_video_15 import HunyuanVideo15, glyph_text
from vgen.checkpoints import resolve
from vgen.conditioning.frames import GivenImages
from vgen.pipelines import text_to_video
from vgen.runtime import noise_generator

PROMPT = 'a red ball says "left" and “right”'
NEGATIVE = "the blue cube"
SIZE: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 5}
STEPS = 3
SIGMA = torch.tensor(0.5)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hunyuan_video_15.build(tmp_path_factory.mktemp("hunyuan-video-15") / "text")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hunyuan-video-15") / "image"
    return tiny_hunyuan_video_15.build(folder, image=True, use_meanflow=True)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "first.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return path


def stock(folder: Path, *, guidance_scale: float, **values: Any) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.guider = pipeline.guider.new(guidance_scale=guidance_scale)
    settings = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipeline(generator=noise_generator(7), **{**settings, **values}).frames


def generated(folder: Path, prompt: str = PROMPT, **values: Any) -> text_to_video.Generation:
    made = planned(folder, prompt, negative_prompt=NEGATIVE, num_inference_steps=STEPS, seed=7, **SIZE, **values)
    return text_to_video.generate(made, loaded(folder))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_text_gives_the_latents_of_stock_diffusers(guidance_scale: float, text: Path) -> None:
    latents = generated(text, guidance_scale=guidance_scale).latents
    assert difference(latents, stock(text, guidance_scale=guidance_scale, **SIZE)) <= TOLERANCE
    noise = torch.randn(latents.shape, generator=noise_generator(7))
    assert difference(latents, noise) > 0.1
    other = generated(text, PROMPT.replace("left", "up"), guidance_scale=guidance_scale).latents
    assert difference(latents, other) > 10 * TOLERANCE


def test_the_default_guidance_is_that_of_the_guider(text: Path) -> None:
    assert resolve(str(text)).defaults.guidance_scale == 4.0


def test_frames_are_those_of_stock_diffusers(text: Path) -> None:
    expected = stock(text, guidance_scale=1.0, output_type="np", **SIZE)[0]
    frames = generated(text, guidance_scale=1.0).frames
    assert frames.shape == (5, 64, 64, 3)
    assert np.abs(frames - (expected * 255).round()).max() <= 1


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_an_image_gives_the_latents_of_stock_diffusers(guidance_scale: float, image: Path, picture: Path) -> None:
    latents = generated(image, image=picture, guidance_scale=guidance_scale).latents
    expected = stock(image, guidance_scale=guidance_scale, image=Image.open(picture), num_frames=SIZE["num_frames"])
    assert difference(latents, expected) <= TOLERANCE


def test_what_is_in_quotes_is_to_be_written() -> None:
    assert glyph_text(PROMPT) == 'Text "left". Text "right". '
    assert glyph_text('"a" and "a"') == 'Text "a". '
    assert glyph_text("nothing") == ""


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_grid_and_the_slots_are_what_the_model_sees(
    kind: str, picture: Path, request: pytest.FixtureRequest
) -> None:
    backbone = loaded(request.getfixturevalue(kind))
    assert isinstance(backbone, HunyuanVideo15)
    assert len(backbone.blocks()) == len(backbone.attention_slots()) == backbone.transformer.config.num_layers
    latents = torch.randn(1, *backbone.latent_shape(5, 64, 64), generator=noise_generator(0))
    grid = backbone.token_grid(5, 64, 64)
    assert grid == (2, 4, 4)
    backbone.sigmas(2, shot_of(5, 64, 64))
    with torch.no_grad():
        (said,) = backbone.encode_prompt([PROMPT])
        given = None
        if kind == "image":
            frame = torch.tensor(np.asarray(Image.open(picture)))[None, None]
            given = backbone.encode_images(GivenImages(first=frame), shot_of(5, 64, 64)).inputs
        lengths = [Lengths(slot) for slot in backbone.attention_slots()]
        before = backbone.velocity(latents, SIGMA, said, image=given)
        assert [look.seen for look in lengths] == [[(2 * 4 * 4, backbone.num_text_tokens())]] * len(lengths)
        for look in lengths:
            look.handle.remove()
        reinstall(backbone.attention_slots())
        assert torch.equal(backbone.velocity(latents, SIGMA, said, image=given), before)


# The configuration is that of "480p_t2v" in huggingface/diffusers scripts/convert_hunyuan_video1_5_to_diffusers.py.
# Size: 8.3 billion parameters (docs/source/en/api/pipelines/hunyuan_video15.md there).
def test_the_real_shapes_have_their_size_and_every_slot() -> None:
    backbone = HunyuanVideo15.__new__(HunyuanVideo15)
    backbone.transformer = on_meta(
        HunyuanVideo15Transformer3DModel,
        in_channels=65,
        out_channels=32,
        num_attention_heads=16,
        attention_head_dim=128,
        num_layers=54,
        num_refiner_layers=2,
        mlp_ratio=4.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=3584,
        text_embed_2_dim=1472,
        image_embed_dim=1152,
        rope_axes_dim=(16, 56, 56),
        task_type="t2v",
    )
    assert num_parameters(backbone.transformer) == pytest.approx(8.3e9, rel=0.02)
    assert len(backbone.blocks()) == len(backbone.attention_slots()) == 54
    assert all(hasattr(slot, "set_processor") for slot in backbone.attention_slots())
