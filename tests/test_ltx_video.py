from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTXImageToVideoPipeline, LTXPipeline
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from PIL import Image

from tests import tiny_ltx_video
from tests.parity import TOLERANCE, Lengths, difference, loaded, num_parameters, on_meta, planned, reinstall
from vgen.backbones import Shot
from vgen.backbones.ltx_video import LTXVideo, pack, unpack
from vgen.errors import UsageError
from vgen.pipelines.text_to_video import generate
from vgen.runtime import noise_generator

PROMPT = "a red ball moves left"
SIZE: dict[str, Any] = {"width": 96, "height": 64, "num_frames": 17}
STEPS = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ltx_video.build(tmp_path_factory.mktemp("ltx-video") / "plain")


def stock(pipeline: type, folder: Path, **values: Any) -> Any:
    made = pipeline.from_pretrained(folder)  # type: ignore[attr-defined]
    made.set_progress_bar_config(disable=True)
    return made(prompt=PROMPT, generator=noise_generator(7), **values).frames


def unpacked(tokens: torch.Tensor) -> torch.Tensor:
    return unpack(tokens, (3, 2, 3), 1, 1)


@pytest.mark.parametrize("sampler", ["euler", "native"])
@pytest.mark.parametrize(("guidance_scale", "fps"), [(1.0, 25), (4.0, 25), (4.0, 10)])
def test_text_gives_the_latents_of_stock_diffusers(
    guidance_scale: float, fps: int, sampler: str, folder: Path
) -> None:
    settings = {**SIZE, **STEPS, "guidance_scale": guidance_scale, "negative_prompt": "blue cube"}
    backbone = loaded(folder)
    latents = generate(planned(folder, PROMPT, seed=7, sampler=sampler, fps=fps, **settings), backbone).latents
    expected = stock(LTXPipeline, folder, output_type="latent", frame_rate=fps, **settings)
    assert difference(latents, unpacked(expected)) <= TOLERANCE
    assert latents.shape[1:] == backbone.latent_shape(17, 64, 96) == (8, 3, 2, 3)
    other = generate(planned(folder, "a blue cube", seed=7, sampler=sampler, fps=fps, **settings), backbone).latents
    assert difference(latents, other) > 100 * TOLERANCE


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_an_image_gives_the_latents_of_stock_diffusers(guidance_scale: float, folder: Path, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    image.save(tmp_path / "first.png")
    settings = {**SIZE, **STEPS, "guidance_scale": guidance_scale}
    made = planned(folder, PROMPT, seed=7, image=tmp_path / "first.png", **settings)
    latents = generate(made, loaded(folder)).latents
    expected = stock(LTXImageToVideoPipeline, folder, image=image, output_type="latent", **settings)
    assert difference(latents, unpacked(expected)) <= TOLERANCE
    without = generate(planned(folder, PROMPT, seed=7, **settings), loaded(folder)).latents
    assert difference(latents[:, :, 1:], without[:, :, 1:]) > 100 * TOLERANCE


@pytest.mark.parametrize("timestep_conditioning", [False, True])
def test_frames_are_those_of_stock_diffusers(timestep_conditioning: bool, tmp_path: Path) -> None:
    folder = tiny_ltx_video.build(tmp_path / "model", timestep_conditioning=timestep_conditioning)
    settings = {**SIZE, **STEPS, "guidance_scale": 1.0}
    frames = generate(planned(folder, PROMPT, seed=7, **settings), loaded(folder)).frames
    expected = (stock(LTXPipeline, folder, output_type="np", **settings)[0] * 255).round()
    assert frames.shape == (17, 64, 96, 3)
    assert np.abs(frames - expected).max() <= 1
    assert frames.std() > 2


def test_frames_go_to_latents_and_back(folder: Path) -> None:
    backbone = loaded(folder, decode_only=True)
    assert not hasattr(backbone, "transformer")
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 9, 32, 32, 3), dtype=np.uint8))
    shot = Shot(num_frames=9, height=32, width=32, fps=25, generator=noise_generator(0))
    with torch.no_grad():
        latents = backbone.encode_frames(frames)
        raw = backbone.vae.encode(frames.permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist.mode()
        expected = backbone.vae.decode(raw).sample
        decoded = backbone.decode(latents, shot)
    assert (decoded - (expected.clamp(-1, 1).permute(0, 2, 3, 4, 1) + 1) * 127.5).abs().max() <= 0.51
    assert difference(latents, raw) > 0.1


def test_more_tokens_mean_more_noise(folder: Path) -> None:
    backbone = loaded(folder)

    def sigmas(width: int) -> torch.Tensor:
        shot = Shot(num_frames=161, height=512, width=width, fps=25, generator=noise_generator(0))
        return backbone.sigmas(8, shot)

    with pytest.raises(UsageError, match="One step is too few"):
        backbone.sigmas(1, Shot(**SIZE, fps=25, generator=noise_generator(0)))
    small, large = sigmas(256), sigmas(1024)
    assert small[0] == large[0] == 1
    assert small[-1] == large[-1] == 0
    assert (small[1:-2] < large[1:-2]).all()
    assert [small[-2].item(), large[-2].item()] == pytest.approx([0.1, 0.1])


def test_the_grid_and_the_slots_are_what_the_model_sees(folder: Path) -> None:
    backbone = loaded(folder)
    shot = Shot(**SIZE, fps=25, generator=noise_generator(7))
    assert backbone.token_grid(17, 64, 96) == (3, 2, 3)
    assert len(backbone.blocks()) == len(backbone.attention_slots()) == 2
    latents, text, sigma = backbone.noise(shot), backbone.encode_prompt([PROMPT]), torch.tensor(0.5)
    lengths = [Lengths(slot) for slot in backbone.attention_slots()]
    with torch.inference_mode():
        before = backbone.velocity(latents, sigma, text[0], shot=shot)
        assert [look.seen for look in lengths] == [[(18, backbone.num_text_tokens())]] * len(lengths)
        reinstall(backbone.attention_slots())
        assert torch.equal(backbone.velocity(latents, sigma, text[0], shot=shot), before)


def test_tokens_are_unpacked_to_what_was_packed() -> None:
    latents = torch.arange(2 * 4 * 6 * 8 * 3.0).view(1, 2, 6, 4, 24)
    assert pack(latents, 2, 2).shape == (1, 3 * 2 * 12, 16)
    assert torch.equal(unpack(pack(latents, 2, 2), (6, 4, 24), 2, 2), latents)
    assert torch.equal(pack(latents, 1, 1), latents.flatten(2).transpose(1, 2))


# 28 layers of 32 heads of 64 with a T5-XXL of 4096 channels: LTXVideoTransformer3DModel's own defaults are the
# configuration of Lightricks/LTX-Video 0.9 (diffusers' scripts/convert_ltx_to_diffusers.py). Its files are named
# "ltxv-2b" (README of Lightricks/LTX-Video); this is the count of the class, to notice when it changes.
def test_the_real_configuration_has_its_size() -> None:
    backbone = LTXVideo.__new__(LTXVideo)
    backbone.transformer = on_meta(LTXVideoTransformer3DModel)
    assert num_parameters(backbone.transformer) == pytest.approx(1.92e9, rel=0.02)
    assert len(backbone.blocks()) == len(backbone.attention_slots()) == 28
    assert all(hasattr(slot, "set_processor") for slot in backbone.attention_slots())
