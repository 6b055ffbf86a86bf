from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from PIL import Image

from tests import tiny_cogvideox
from tests.parity import TOLERANCE, Lengths, difference, loaded, num_parameters, on_meta, planned, reinstall
from vgen.backbones import Shot
from vgen.backbones.cogvideox import CogVideoX
from vgen.checkpoints import resolve
from vgen.errors import CheckpointError, UsageError
from vgen.pipelines.text_to_video import generate
from vgen.plan import plan
from vgen.request import GenerateRequest
from vgen.runtime import noise_generator

PROMPT = "a red ball moves left"
SIZE: dict[str, Any] = {"width": 48, "height": 32, "num_frames": 9}
NATIVE: dict[str, Any] = {"width": 64, "height": 48, "num_frames": 9}
STEPS = {"num_inference_steps": 4}
DDIM = "CogVideoXDDIMScheduler"
DPM = "CogVideoXDPMScheduler"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cogvideox")

    @cache
    def build(version: str, *, image: bool = False, scheduler: str = DPM) -> Path:
        name = f"{version}-{image}-{scheduler}"
        return tiny_cogvideox.build(folder / name, version=version, image=image, scheduler=scheduler)

    return build


def shot_of(size: dict[str, Any]) -> Shot:
    return Shot(**size, fps=8, generator=noise_generator(7))


def stock(pipeline: type, folder: Path, **values: Any) -> Any:
    made = pipeline.from_pretrained(folder)  # type: ignore[attr-defined]
    made.set_progress_bar_config(disable=True)
    length = tiny_cogvideox.TEXT_LENGTH
    return made(prompt=PROMPT, generator=noise_generator(7), max_sequence_length=length, **values).frames


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize(
    ("version", "scheduler", "sampler"),
    [("2b", DDIM, "native"), ("5b", DPM, "native"), ("1.5", DPM, "native"), ("5b", DDIM, "euler")],
)
def test_text_gives_the_latents_of_stock_diffusers(
    version: str, scheduler: str, sampler: str, guidance_scale: float, built: Any
) -> None:
    folder = built(version, scheduler=scheduler)
    settings = {**SIZE, **STEPS, "guidance_scale": guidance_scale, "negative_prompt": "blue cube"}
    backbone = loaded(folder)
    latents = generate(planned(folder, PROMPT, seed=7, sampler=sampler, **settings), backbone).latents
    expected = stock(CogVideoXPipeline, folder, output_type="latent", **settings).movedim(1, 2)
    assert difference(latents, expected) <= TOLERANCE
    assert latents.shape[1:] == backbone.latent_shape(9, 32, 48) == (4, 4 if version == "1.5" else 3, 4, 6)
    other = generate(planned(folder, "a blue cube", seed=7, sampler=sampler, **settings), backbone).latents
    assert difference(latents, other) > 100 * TOLERANCE


def test_what_the_checkpoint_says_is_the_default(built: Any) -> None:
    made = planned(built("5b"), PROMPT, **SIZE)
    assert (made.sampler, made.guidance_scale, made.num_inference_steps, made.fps) == ("native", 6.0, 50, 8)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("version", ["5b", "1.5"])
def test_an_image_gives_the_latents_of_stock_diffusers(
    version: str, guidance_scale: float, built: Any, tmp_path: Path
) -> None:
    folder = built(version, image=True)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "first.png")
    settings = {**NATIVE, **STEPS, "guidance_scale": guidance_scale}
    made = planned(folder, PROMPT, seed=7, image=tmp_path / "first.png", **settings)
    backbone = loaded(folder)
    latents = generate(made, backbone).latents
    expected = stock(CogVideoXImageToVideoPipeline, folder, image=image, output_type="latent", **settings)
    assert difference(latents, expected.movedim(1, 2)) <= TOLERANCE
    Image.fromarray(255 - pixels).save(tmp_path / "first.png")
    assert difference(generate(made, backbone).latents, latents) > 100 * TOLERANCE


@pytest.mark.parametrize("version", ["5b", "1.5"])
def test_frames_are_those_of_stock_diffusers(version: str, built: Any) -> None:
    folder = built(version)
    settings = {**SIZE, **STEPS, "guidance_scale": 1.0}
    frames = generate(planned(folder, PROMPT, seed=7, **settings), loaded(folder)).frames
    expected = (stock(CogVideoXPipeline, folder, output_type="np", **settings)[0] * 255).round()
    assert frames.shape == (9, 32, 48, 3)
    assert np.abs(frames - expected).max() <= 1
    assert frames.std() > 2


def test_a_backbone_for_decoding_holds_the_vae_alone(built: Any) -> None:
    backbone = loaded(built("1.5"), decode_only=True)
    assert not hasattr(backbone, "transformer")
    with torch.no_grad():
        assert backbone.decode(torch.randn(1, 4, 4, 4, 6), shot_of(SIZE)).shape == (1, 9, 32, 48, 3)


def test_timesteps_are_those_of_the_scheduler(built: Any) -> None:
    backbone = loaded(built("5b"))
    seen: list[torch.Tensor] = []
    backbone.transformer.register_forward_pre_hook(
        lambda module, arguments, values: seen.append(values["timestep"]), with_kwargs=True
    )
    text, shot = backbone.encode_prompt(["a"])[0].detach(), shot_of(SIZE)
    for num_inference_steps in (1, 7, 50):
        seen.clear()
        sigmas = backbone.sigmas(num_inference_steps, shot)
        assert (sigmas[0], sigmas[-1], len(sigmas)) == (1, 0, num_inference_steps + 1)
        with torch.no_grad():
            for sigma in sigmas[:-1]:
                backbone.velocity(torch.zeros(1, 4, 3, 4, 6), sigma, text, shot=shot)
        assert torch.equal(torch.cat(seen), backbone.scheduler.timesteps)


@pytest.mark.parametrize("version", ["2b", "5b", "1.5"])
def test_the_grid_and_the_slots_are_what_the_model_sees(version: str, built: Any) -> None:
    backbone, shot = loaded(built(version)), shot_of(SIZE)
    frames, rows, columns = backbone.token_grid(9, 32, 48)
    assert (frames, rows, columns) == (2 if version == "1.5" else 3, 2, 3)
    assert len(backbone.blocks()) == len(backbone.attention_slots()) == 2
    latents, text, sigma = backbone.noise(shot), backbone.encode_prompt([PROMPT])[0].detach(), torch.tensor(0.5)
    lengths = [Lengths(slot) for slot in backbone.attention_slots()]
    with torch.no_grad():
        before = backbone.velocity(latents, sigma, text, shot=shot)
        expected = [(frames * rows * columns, backbone.num_text_tokens())]
        assert [look.seen for look in lengths] == [expected] * len(lengths)
        reinstall(backbone.attention_slots())
        assert torch.equal(backbone.velocity(latents, sigma, text, shot=shot), before)


def test_unknown_words_are_named(built: Any) -> None:
    backbone = loaded(built("5b"))
    assert backbone.unknown_words("a red zebra, zebra tower on grass") == ["zebra,", "zebra", "tower"]
    assert backbone.num_tokens("a red ball") == 4
    with torch.no_grad():
        assert backbone.encode_prompt(["\ud800 a ball"])[0].isfinite().all()


def test_requests_that_the_model_cannot_take_are_refused(built: Any, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "first.png")
    for folder, values, message in (
        (built("5b", image=True), NATIVE, "makes videos from a first image"),
        (built("5b", image=True), {**SIZE, "image": tmp_path / "first.png"}, "has learned 64x48 only"),
        (built("5b"), {**SIZE, "image": tmp_path / "first.png"}, "cannot start from an image"),
    ):
        with pytest.raises(UsageError, match=message):
            plan(GenerateRequest(prompt=PROMPT, model=str(folder), **values), resolve(str(folder)))


def test_a_scheduler_that_starts_or_ends_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = tiny_cogvideox.build(tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_betas_zero_snr": False}))
    with pytest.raises(CheckpointError, match="rescale_betas_zero_snr = False"):
        loaded(folder)


# Configurations as diffusers' own conversion script for these checkpoints writes them (scripts/
# convert_cogvideox_to_diffusers.py in huggingface/diffusers): 30 layers of 30 heads; 42 of 48, with rotary positions.
# "2B" and "5B" are names, not sizes; these are the counts of the classes, to notice when they change.
@pytest.mark.parametrize(
    ("config", "num_layers", "billions"),
    [
        ({}, 30, 1.693),
        ({"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}, 42, 5.570),
    ],
)
def test_real_configurations_have_their_size(config: Any, num_layers: int, billions: float) -> None:
    backbone = CogVideoX.__new__(CogVideoX)
    backbone.transformer = on_meta(CogVideoXTransformer3DModel, **config)
    assert num_parameters(backbone.transformer) == pytest.approx(billions * 1e9, rel=0.02)
    assert len(backbone.blocks()) == len(backbone.attention_slots()) == num_layers
    assert all(hasattr(slot, "set_processor") for slot in backbone.attention_slots())
    assert backbone.num_text_tokens() == 226
