from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanVideoTransformer3DModel
from PIL import Image

from tests import tiny_hunyuan_video
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
from vgen.backbones.hunyuan_video import HunyuanVideo
from vgen.checkpoints import resolve
from vgen.conditioning.frames import GivenImages
from vgen.errors import UsageError
from vgen.pipelines import text_to_video
from vgen.runtime import noise_generator

PROMPT = "a red ball jumps on the grass"
NEGATIVE = "the blue cube"
SIZE: dict[str, Any] = {"width": 48, "height": 32, "num_frames": 9}
STEPS = 4
SIGMA = torch.tensor(0.5)
# The two ways in which an image reaches the model.
CONCAT, REPLACE = "latent_concat", "token_replace"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    root = tmp_path_factory.mktemp("hunyuan-video")
    return {
        None: tiny_hunyuan_video.build(root / "text"),
        CONCAT: tiny_hunyuan_video.build(root / "concat", CONCAT, guidance_embeds=False),
        REPLACE: tiny_hunyuan_video.build(root / "replace", REPLACE),
    }


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "first.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(path)
    return path


def stock(folder: Path, **values: Any) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS}
    return pipeline(generator=noise_generator(7), **{**SIZE, **settings, **values}).frames


def generated(folder: Path, prompt: str = PROMPT, **values: Any) -> text_to_video.Generation:
    made = planned(folder, prompt, negative_prompt=NEGATIVE, num_inference_steps=STEPS, seed=7, **SIZE, **values)
    return text_to_video.generate(made, loaded(folder))


@pytest.mark.parametrize("true_cfg_scale", [1.0, 3.0])
def test_text_gives_the_latents_of_stock_diffusers(true_cfg_scale: float, folders: dict[str | None, Path]) -> None:
    scales = {"guidance_scale": 6.0, "true_cfg_scale": true_cfg_scale}
    latents = generated(folders[None], **scales).latents
    assert difference(latents, stock(folders[None], output_type="latent", **scales)) <= TOLERANCE
    noise = torch.randn(latents.shape, generator=noise_generator(7))
    assert difference(latents, noise) > 0.1
    assert difference(latents, generated(folders[None], "a cube moves left", **scales).latents) > 10 * TOLERANCE
    less = {**scales, "guidance_scale": 1.0}
    assert difference(latents, generated(folders[None], **less).latents) > 10 * TOLERANCE


def test_frames_are_those_of_stock_diffusers(folders: dict[str | None, Path]) -> None:
    expected = (stock(folders[None], output_type="np", guidance_scale=6.0)[0] * 255).round()
    frames = generated(folders[None], guidance_scale=6.0).frames
    assert frames.shape == (9, 32, 48, 3)
    assert np.abs(frames - expected).max() <= 1


@pytest.mark.parametrize("prompt", [PROMPT, "ball " * 1000])
def test_an_image_held_in_place_gives_the_latents_of_stock_diffusers(
    prompt: str, folders: dict[str | None, Path], picture: Path
) -> None:
    latents = generated(folders[REPLACE], prompt, image=picture, guidance_scale=6.0).latents
    expected = stock(
        folders[REPLACE], prompt=prompt, image=Image.open(picture), output_type="latent", guidance_scale=6.0
    )
    assert difference(latents, expected) <= TOLERANCE


def test_an_image_in_channels_gives_the_latents_of_stock_diffusers(
    folders: dict[str | None, Path], picture: Path
) -> None:
    # The model makes four frames more than it is asked for, which diffusers takes from those asked for.
    expected = stock(
        folders[CONCAT], image=Image.open(picture), output_type="latent", true_cfg_scale=3.0, num_frames=13
    )
    made = generated(folders[CONCAT], image=picture, guidance_scale=3.0)
    assert difference(made.latents[:, :, 1:], expected) <= TOLERANCE
    expected = stock(folders[CONCAT], image=Image.open(picture), output_type="np", true_cfg_scale=3.0, num_frames=13)
    assert made.frames.shape == (9, 32, 48, 3)
    assert np.abs(made.frames - (expected[0] * 255).round()).max() <= 1
    with torch.no_grad():
        again = loaded(folders[CONCAT], decode_only=True).decode(made.latents)[0]
    assert np.array_equal(again.numpy(), made.frames)


def test_a_negative_prompt_is_read_with_as_many_image_tokens_as_the_prompt(
    folders: dict[str | None, Path], picture: Path
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folders[REPLACE])
    with torch.no_grad():
        tokens, pooled, mask = pipeline.encode_prompt(
            Image.new("RGB", (48, 32)), NEGATIVE, max_sequence_length=256, image_embed_interleave=4
        )
    (text,) = loaded(folders[REPLACE]).encode_prompt([NEGATIVE])
    assert difference(text.tokens, tokens) <= TOLERANCE
    assert difference(text.pooled, pooled) <= TOLERANCE
    assert torch.equal(text.mask, mask)
    scales = {"guidance_scale": 6.0, "true_cfg_scale": 3.0}
    expected = stock(
        folders[REPLACE],
        image=Image.open(picture),
        output_type="latent",
        negative_prompt=None,
        negative_prompt_embeds=tokens,
        negative_pooled_prompt_embeds=pooled,
        negative_prompt_attention_mask=mask,
        **scales,
    )
    assert difference(generated(folders[REPLACE], image=picture, **scales).latents, expected) <= TOLERANCE


@pytest.mark.parametrize("kind", [None, CONCAT, REPLACE])
def test_the_grid_and_the_slots_are_what_the_model_sees(
    kind: str | None, folders: dict[str | None, Path], picture: Path
) -> None:
    backbone = loaded(folders[kind])
    assert isinstance(backbone, HunyuanVideo)
    config = backbone.transformer.config
    assert len(backbone.blocks()) == len(backbone.attention_slots()) == config.num_layers + config.num_single_layers
    images = GivenImages(first=torch.tensor(np.asarray(Image.open(picture)))[None, None]) if kind else None
    latents = torch.randn(1, *backbone.latent_shape(9, 32, 48), generator=noise_generator(0))
    frames, rows, columns = backbone.token_grid(9, 32, 48)
    assert (frames, rows, columns) == (4 if kind == CONCAT else 3, 2, 3)
    with torch.no_grad():
        (text,) = backbone.encode_prompt([PROMPT], images)
        image = backbone.encode_images(images, shot_of(9, 32, 48)).inputs if images else None
        lengths = [Lengths(slot) for slot in backbone.attention_slots()]
        before = backbone.velocity(latents, SIGMA, text, image=image, guidance_scale=6.0)
        expected = [(frames * rows * columns, backbone.num_text_tokens())]
        assert [look.seen for look in lengths] == [expected] * len(lengths)
        for look in lengths:
            look.handle.remove()
        reinstall(backbone.attention_slots())
        after = backbone.velocity(latents, SIGMA, text, image=image, guidance_scale=6.0)
    assert torch.equal(before, after)


def test_guidance_has_the_names_of_diffusers(folders: dict[str | None, Path], picture: Path) -> None:
    made = planned(folders[None], PROMPT, **SIZE)
    assert (made.guidance_scale, made.embedded_guidance_scale, made.cfg_scale) == (6.0, 6.0, 1.0)
    assert planned(folders[None], PROMPT, **SIZE, true_cfg_scale=2.0).cfg_scale == 2.0
    made = planned(folders[CONCAT], PROMPT, **SIZE, image=picture, guidance_scale=3.0)
    assert (made.embedded_guidance_scale, made.cfg_scale) == (None, 3.0)
    assert resolve(str(folders[CONCAT])).defaults.guidance_scale == 1.0
    with pytest.raises(UsageError, match="cannot start from an image"):
        planned(folders[None], PROMPT, **SIZE, image=picture)
    with pytest.raises(UsageError, match="makes videos from a first image"):
        planned(folders[REPLACE], PROMPT, **SIZE)


# The configuration is the class's default, which huggingface/diffusers scripts/convert_hunyuan_video_to_diffusers.py
# loads the weights into. Size: 13 billion parameters (arXiv:2412.03603).
def test_the_real_shapes_have_their_size_and_every_slot() -> None:
    backbone = HunyuanVideo.__new__(HunyuanVideo)
    backbone.transformer = on_meta(HunyuanVideoTransformer3DModel)
    assert num_parameters(backbone.transformer) == pytest.approx(13e9, rel=0.02)
    assert len(backbone.blocks()) == len(backbone.attention_slots()) == 20 + 40
    assert all(hasattr(slot, "set_processor") for slot in backbone.attention_slots())
