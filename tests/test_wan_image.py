from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from PIL import Image

from tests import tiny_wan_image
from tests.parity import TOLERANCE, difference, loaded, num_parameters, on_meta, planned, shot_of
from vgen import manifest
from vgen.backbones.wan import Wan
from vgen.conditioning.frames import GivenImages
from vgen.errors import UsageError, VgenError
from vgen.pipelines import text_to_video
from vgen.runtime import Runtime, noise_generator

PROMPT = "a red ball jumps on the grass"
SIZE: dict[str, Any] = {"width": 48, "height": 32, "num_frames": 9, "num_inference_steps": 5}


@pytest.fixture(autouse=True)
def without_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    # This pipeline calls ftfy, an optional package, without asking whether it is there.
    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", pipeline_wan.prompt_clean)


@pytest.fixture(scope="module")
def wan21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan_image.build(tmp_path_factory.mktemp("wan") / "i2v")


@pytest.fixture(scope="module")
def both_ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan_image.build(tmp_path_factory.mktemp("wan") / "flf2v", both_ends=True)


@pytest.fixture(scope="module")
def wan22(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan_image.build(tmp_path_factory.mktemp("wan") / "i2v-two", encoder=False, boundary=0.8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {name: tmp_path_factory.mktemp("pictures") / f"{name}.png" for name in ("image", "last_image")}
    for seed, path in enumerate(paths.values()):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def compare(folder: Path, images: dict[str, Path], **values: Any) -> tuple[float, torch.Tensor]:
    """Return how far vgen's latents are from stock diffusers', and vgen's."""
    made = planned(folder, PROMPT, seed=7, negative_prompt="blue cube", **SIZE, **images, **values)
    latents = text_to_video.generate(made, loaded(folder)).latents
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt=PROMPT,
        negative_prompt="blue cube",
        generator=noise_generator(7),
        output_type="latent",
        **SIZE,
        **{name: Image.open(path) for name, path in images.items()},
        **values,
    ).frames
    return difference(latents, expected), latents


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_an_image_and_its_embeddings_give_the_latents_of_stock_diffusers(
    guidance_scale: float, wan21: Path, pictures: dict[str, Path]
) -> None:
    apart, latents = compare(wan21, {"image": pictures["image"]}, guidance_scale=guidance_scale)
    assert apart <= TOLERANCE
    other, another = compare(wan21, {"image": pictures["last_image"]}, guidance_scale=guidance_scale)
    assert other <= TOLERANCE
    assert difference(latents, another) > 100 * TOLERANCE


def test_a_first_and_a_last_image_give_the_latents_of_stock_diffusers(
    both_ends: Path, pictures: dict[str, Path]
) -> None:
    apart, latents = compare(both_ends, pictures, guidance_scale=4.0)
    assert apart <= TOLERANCE
    _, swapped = compare(both_ends, dict(zip(pictures, reversed(pictures.values()), strict=True)), guidance_scale=4.0)
    assert difference(latents, swapped) > 100 * TOLERANCE


@pytest.mark.parametrize("ends", [["image"], ["image", "last_image"]])
def test_two_transformers_with_a_guidance_scale_each_give_the_latents_of_stock_diffusers(
    ends: list[str], wan22: Path, pictures: dict[str, Path]
) -> None:
    images = {name: pictures[name] for name in ends}
    apart, latents = compare(wan22, images, guidance_scale=4.0, guidance_scale_2=2.0)
    assert apart <= TOLERANCE
    same, alike = compare(wan22, images, guidance_scale=4.0)
    assert same <= TOLERANCE
    assert difference(latents, alike) > 100 * TOLERANCE


def test_the_second_transformer_runs_where_the_noise_is_below_the_boundary(wan22: Path) -> None:
    backbone = loaded(wan22)
    assert isinstance(backbone, Wan)
    runs: list[int] = []
    for number, transformer in enumerate((backbone.transformer, backbone.transformer_2), 1):
        assert transformer is not None
        transformer.register_forward_pre_hook(lambda module, arguments, number=number: runs.append(number))
    text = backbone.encode_prompt([""])[0]
    frame = torch.zeros(1, 1, 32, 48, 3, dtype=torch.uint8)
    with torch.no_grad():
        image = backbone.encode_images(GivenImages(first=frame), shot_of(9, 32, 48)).inputs
        for sigma in (1.0, 0.8, 0.79, 0.1):
            backbone.velocity(torch.zeros(1, 16, 3, 4, 6), torch.tensor(sigma), text.detach(), image=image)
    assert runs == [1, 1, 2, 2]
    layers = backbone.transformer.config.num_layers
    assert len(backbone.blocks()) == len(backbone.attention_slots()) == 2 * layers
    assert len({id(slot) for slot in backbone.attention_slots()}) == 2 * layers


def test_frames_are_those_of_stock_diffusers(wan21: Path, pictures: dict[str, Path]) -> None:
    made = planned(wan21, PROMPT, seed=7, image=pictures["image"], guidance_scale=1.0, **SIZE)
    frames = text_to_video.generate(made, loaded(wan21)).frames
    pipeline = DiffusionPipeline.from_pretrained(wan21)
    expected = pipeline(
        image=Image.open(pictures["image"]), prompt=PROMPT, guidance_scale=1.0, generator=noise_generator(7), **SIZE
    ).frames[0]
    assert np.abs(frames - (expected * 255).round()).max() <= 1


def test_the_manifest_tells_both_images(both_ends: Path, pictures: dict[str, Path]) -> None:
    made = planned(both_ends, PROMPT, **SIZE, **pictures)
    runtime = Runtime(device="cpu", dtype="float32")
    told = manifest.build(made, runtime, checkpoint={}, timings={}, created=datetime(2026, 1, 2, tzinfo=UTC))
    again = manifest.request(told, {})
    assert (again.image, again.last_image) == (pictures["image"], pictures["last_image"])
    told["last_image_sha256"] = told["image_sha256"]
    with pytest.raises(VgenError, match="has changed since") as raised:
        manifest.request(told, {})
    assert raised.value.tip == "give one with --last-image."


def test_images_are_refused_before_loading_where_the_model_cannot_take_them(
    wan21: Path, tiny_checkpoint: Path, pictures: dict[str, Path]
) -> None:
    with pytest.raises(UsageError, match="makes videos from a first image"):
        planned(wan21, PROMPT, **SIZE)
    with pytest.raises(UsageError, match="cannot end with an image"):
        planned(wan21, PROMPT, **SIZE, **pictures)
    with pytest.raises(UsageError, match="cannot start from an image"):
        planned(tiny_checkpoint, PROMPT, **SIZE, image=pictures["image"])
    with pytest.raises(UsageError, match="a last image and no first one"):
        planned(wan21, PROMPT, **SIZE, last_image=pictures["image"])
    with pytest.raises(UsageError, match="takes no other frames"):
        planned(wan21, PROMPT, **SIZE, image=pictures["image"], interpolate=("a.png@4",))
    with pytest.raises(UsageError, match="one transformer"):
        planned(tiny_checkpoint, PROMPT, **SIZE, guidance_scale_2=2.0)
    with pytest.raises(UsageError, match="classifier-free already"):
        planned(tiny_checkpoint, PROMPT, **SIZE, true_cfg_scale=2.0)


# Configurations as huggingface/diffusers scripts/convert_wan_to_diffusers.py has them. Sizes: weights of 2.84 and
# 28.6 GB in 16 bits (localmodel.run/model/wan-2-1-t2v-1-3b and -14b). For images there is no figure but "14B": the
# text model's, and in each block a key and a value projection of 5120 x 5120 more. "5B" is Wan2.2's, whose dimensions
# are in Wan-Video/Wan2.2 wan/configs/wan_ti2v_5B.py.
REAL: dict[str, tuple[dict[str, Any], float]] = {
    "Wan2.1-T2V-1.3B": ({"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}, 1.42e9),
    "Wan2.1-T2V-14B": ({"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}, 14.3e9),
    "Wan2.2-TI2V-5B": (
        {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        5.0e9,
    ),
    "Wan2.1-I2V-14B": (
        {
            "num_attention_heads": 40,
            "num_layers": 40,
            "ffn_dim": 13824,
            "in_channels": 36,
            "image_dim": 1280,
            "added_kv_proj_dim": 5120,
        },
        14.3e9 + 40 * 2 * 5120**2,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_shapes_have_their_size_and_every_slot(name: str) -> None:
    config, size = REAL[name]
    backbone = Wan.__new__(Wan)
    backbone.transformer, backbone.transformer_2 = on_meta(WanTransformer3DModel, **config), None
    assert num_parameters(backbone.transformer) == pytest.approx(size, rel=0.02)
    assert len(backbone.blocks()) == len(backbone.attention_slots()) == config["num_layers"]
    assert all(hasattr(slot, "set_processor") for slot in backbone.attention_slots())
