from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from PIL import Image

from vgen import backbones
from vgen import latents as kept
from vgen.checkpoints import resolve
from vgen.errors import VgenError
from vgen.pipelines import text_to_video
from vgen.plan import Plan, plan
from vgen.request import GenerateRequest
from vgen.runtime import choose, noise_generator
from vgen.sampling import SAMPLERS

SIZE: dict[str, Any] = {"width": 48, "height": 32, "num_frames": 9}
PROMPT = "A red ball jumps on the grass &amp;  moves left"
TOLERANCE = 1e-5


def planned(folder: Path, **changes: Any) -> Plan:
    values = {"model": str(folder), "prompt": PROMPT, "seed": 7, "num_inference_steps": 6, "guidance_scale": 4.0}
    return plan(GenerateRequest(**{**values, **SIZE, **changes}), resolve(str(folder)))


def loaded(folder: Path, dtype: str = "float32") -> backbones.Backbone:
    return backbones.load(resolve(str(folder)), choose("cpu", dtype))


def stock(pipeline: Any, made: Plan, **extra: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=made.prompt,
        negative_prompt=made.negative_prompt,
        guidance_scale=made.guidance_scale,
        num_inference_steps=made.num_inference_steps,
        max_sequence_length=made.checkpoint.defaults.max_sequence_length,
        generator=noise_generator(made.seed),
        **{**SIZE, **extra},
    ).frames


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("expanded", [False, True])
def test_euler_gives_the_latents_of_stock_diffusers(
    expanded: bool, guidance_scale: float, tiny_checkpoint: Path, tiny_expanded: Path
) -> None:
    folder = tiny_expanded if expanded else tiny_checkpoint
    made = planned(folder, guidance_scale=guidance_scale, negative_prompt="blue cube")
    generation = text_to_video.generate(made, loaded(folder))
    pipeline = WanPipeline.from_pretrained(folder)
    assert pipeline.config.expand_timesteps == expanded
    expected = stock(pipeline, made, output_type="latent")
    assert (generation.latents - expected).abs().max().item() <= TOLERANCE
    # The trajectory moves and depends on the prompt, so that equality says something.
    noise = torch.randn(expected.shape, generator=noise_generator(made.seed))
    assert (expected - noise).abs().max() > 0.1
    other = text_to_video.generate(replace(made, prompt="a blue cube"), loaded(folder))
    assert (generation.latents - other.latents).abs().max().item() > 100 * TOLERANCE


def test_guidance_is_where_its_interval_says(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = loaded(tiny_checkpoint)
    velocity, seen = backbone.velocity, []

    def noted(latents: torch.Tensor, sigma: torch.Tensor, text: Any, **rest: Any) -> torch.Tensor:
        seen.append(float(sigma))
        return velocity(latents, sigma, text, **rest)

    monkeypatch.setattr(backbone, "velocity", noted)
    made = planned(tiny_checkpoint, guidance_interval="0.6-0.95", sampler="euler")
    sigmas = backbone.sigmas(6, text_to_video.shot_of(made))[:-1].tolist()
    inside = [sigma for sigma in sigmas if 0.6 < sigma <= 0.95]
    assert 0 < len(inside) < 5
    part = text_to_video.generate(made, backbone).latents
    assert sorted(seen) == sorted([*sigmas, *inside])
    everywhere, none = (
        text_to_video.generate(planned(tiny_checkpoint, sampler="euler", **changes), backbone).latents
        for changes in ({"guidance_interval": "0-1"}, {"guidance_scale": 1.0})
    )
    assert not torch.equal(part, everywhere) and not torch.equal(part, none)
    usual = text_to_video.generate(planned(tiny_checkpoint, sampler="euler"), backbone).latents
    assert torch.equal(everywhere, usual)


@pytest.mark.skipif(not resolve("toyland").files, reason="there are no weights to compare")
def test_the_embedded_checkpoint_gives_the_latents_of_stock_diffusers() -> None:
    checkpoint = resolve("toyland")
    request = GenerateRequest(prompt="a red ball on grass", seed=7, num_inference_steps=4)
    made = plan(request, checkpoint)
    generation = text_to_video.generate(made, backbones.load(checkpoint, choose("cpu", "float32")))
    pipeline = WanPipeline.from_pretrained(checkpoint.folder, dtype=torch.float32)  # its files are bfloat16
    size = {"width": made.width, "height": made.height, "num_frames": made.num_frames}
    expected = stock(pipeline, made, output_type="latent", **size)
    # Stock hands the timestep to each token, and products of other shapes round otherwise: of that, four guided steps
    # of trained weights make 3e-5.
    assert (generation.latents - expected).abs().max().item() <= 10 * TOLERANCE


def test_frames_are_those_of_stock_diffusers(tiny_checkpoint: Path) -> None:
    made = planned(tiny_checkpoint)
    generation = text_to_video.generate(made, loaded(tiny_checkpoint))
    expected = (stock(WanPipeline.from_pretrained(tiny_checkpoint), made, output_type="np")[0] * 255).round()
    assert generation.frames.shape == (9, 32, 48, 3)
    assert generation.frames.dtype == np.uint8
    assert np.abs(generation.frames - expected).max() <= 1
    assert generation.frames.std() > 5


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_first_image_gives_the_latents_of_stock_diffusers(
    guidance_scale: float, tiny_expanded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This pipeline calls ftfy, an optional package, without asking whether it is there.
    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", pipeline_wan.prompt_clean)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "first.png")
    made = planned(tiny_expanded, image=tmp_path / "first.png", guidance_scale=guidance_scale)
    generation = text_to_video.generate(made, loaded(tiny_expanded))
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_expanded, image_encoder=None, image_processor=None)
    assert pipeline.config.expand_timesteps
    expected = stock(pipeline, made, image=image, output_type="latent")
    assert (generation.latents - expected).abs().max().item() <= TOLERANCE
    without = text_to_video.generate(planned(tiny_expanded, guidance_scale=guidance_scale), loaded(tiny_expanded))
    assert (generation.latents - without.latents)[:, :, 1:].abs().max() > 100 * TOLERANCE


def test_a_first_image_of_another_shape_is_cut_and_said_so(tiny_expanded: Path, tmp_path: Path) -> None:
    Image.new("RGB", (100, 100), "red").save(tmp_path / "square.png")
    made = planned(tiny_expanded, image=tmp_path / "square.png", num_inference_steps=1)
    warnings: list[str] = []
    text_to_video.generate(made, loaded(tiny_expanded), on_warning=warnings.append)
    assert len(warnings) == 1 and "100x100" in warnings[0]


def test_the_same_seed_gives_the_same_frames_and_another_one_others(tiny_checkpoint: Path) -> None:
    backbone = loaded(tiny_checkpoint)
    first, again, other = (
        text_to_video.generate(planned(tiny_checkpoint, seed=seed), backbone).frames for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_stages_and_steps_are_reported_and_timed(tiny_checkpoint: Path) -> None:
    stages: list[str] = []
    steps: list[tuple[int, int]] = []
    saved: list[torch.Tensor] = []
    generation = text_to_video.generate(
        planned(tiny_checkpoint, num_inference_steps=2),
        loaded(tiny_checkpoint),
        on_stage=stages.append,
        on_step=lambda i, n: steps.append((i, n)),
        save_latents=saved.append,
    )
    assert stages == ["encode", "denoise", "decode"] == list(generation.timings)
    assert all(seconds > 0 for seconds in generation.timings.values())
    assert steps == [(1, 2), (2, 2)]
    assert torch.equal(saved[0], generation.latents)


def test_an_interrupt_goes_through(tiny_checkpoint: Path) -> None:
    def interrupt(i: int, n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        text_to_video.generate(planned(tiny_checkpoint), loaded(tiny_checkpoint), on_step=interrupt)


def test_unknown_words_and_a_prompt_too_long_are_named(tiny_checkpoint: Path) -> None:
    backbone = loaded(tiny_checkpoint)

    def warnings_of(prompt: str) -> list[str]:
        """Return what is told before the first step."""
        told: list[str] = []

        def stop(i: int, n: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            made = planned(tiny_checkpoint, prompt=prompt)
            text_to_video.generate(made, backbone, on_warning=told.append, on_step=stop)
        return told

    (unknown,) = warnings_of("A red dragon, a castle and a dragon!")
    assert unknown.startswith('The model has never seen "dragon", "castle", "and".')
    assert warnings_of("red ball " * 5000) == ["The prompt has 10001 tokens, but the model reads the first 512."]
    assert warnings_of("a red ball") == []


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("euler", "lcm", "native")])
def test_every_sampler_follows_the_same_flow(sampler: str, tiny_checkpoint: Path) -> None:
    # Loose, as the velocity of a random network swings with every timestep; test_sampling.py measures the orders.
    backbone = loaded(tiny_checkpoint)
    euler, other = (
        text_to_video.generate(planned(tiny_checkpoint, sampler=name, num_inference_steps=50), backbone).latents
        for name in ("euler", sampler)
    )
    assert 0 < (other - euler).abs().mean().item() < 0.05 * euler.std().item()


def test_bfloat16_stays_near_float32(tiny_checkpoint: Path) -> None:
    made = planned(tiny_checkpoint)
    exact = text_to_video.generate(made, loaded(tiny_checkpoint)).latents
    rounded = text_to_video.generate(made, loaded(tiny_checkpoint, "bfloat16")).latents
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean().item() < 0.05


def test_saved_latents_decode_to_the_same_frames(tiny_checkpoint: Path, tmp_path: Path) -> None:
    backbone = loaded(tiny_checkpoint)
    made = planned(tiny_checkpoint)
    path = tmp_path / "latents.safetensors"
    generation = text_to_video.generate(made, backbone, save_latents=lambda latents: kept.save(path, latents, made))
    assert [file.name for file in tmp_path.iterdir()] == ["latents.safetensors"]
    latents, request = kept.load(path)
    assert torch.equal(latents, generation.latents)
    assert plan(request, made.checkpoint) == made
    again = text_to_video.decode_latents(path, backbone)
    assert np.array_equal(again.frames, generation.frames)
    assert list(again.timings) == ["decode"]


def test_a_failed_decode_leaves_the_latents(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no memory")

    backbone = loaded(tiny_checkpoint)
    made = planned(tiny_checkpoint, num_inference_steps=1)
    path = tmp_path / "latents.safetensors"
    monkeypatch.setattr(AutoencoderKLWan, "decode", fail)
    with pytest.raises(RuntimeError):
        text_to_video.generate(made, backbone, save_latents=lambda x: kept.save(path, x, made))
    monkeypatch.undo()
    assert text_to_video.decode_latents(path, backbone).frames.shape == (9, 32, 48, 3)


def test_latents_that_do_not_fit_on_the_disk_are_an_error_and_leave_nothing(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    made = planned(tiny_checkpoint)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(VgenError, match="Could not write"):
            kept.save(tmp_path / "latents.safetensors", torch.zeros(1, 16, 3, 16, 16), made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(VgenError, match="Could not write"):
        kept.save(tmp_path / "nowhere" / "latents.safetensors", torch.zeros(1), made)


def test_files_that_are_no_latents_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(VgenError, match="There is no file"):
        kept.load(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("not latents")
    with pytest.raises(VgenError, match="Cannot read the latents"):
        kept.load(tmp_path / "text.safetensors")
    save_file({"latents": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(VgenError, match="holds no latents of vgen"):
        kept.load(tmp_path / "foreign.safetensors")
    metadata = {"vgen": "latents", "request": json.dumps({"prompt": "a"})}
    save_file({"other": torch.zeros(1)}, tmp_path / "empty.safetensors", metadata=metadata)
    with pytest.raises(VgenError, match="Cannot read the latents"):
        kept.load(tmp_path / "empty.safetensors")


def test_values_that_are_not_finite_are_an_error(tiny_checkpoint: Path) -> None:
    backbone = loaded(tiny_checkpoint)
    with torch.no_grad():
        backbone.transformer.proj_out.bias.fill_(float("nan"))  # type: ignore[attr-defined]
    with pytest.raises(VgenError, match="not finite"):
        text_to_video.generate(planned(tiny_checkpoint, num_inference_steps=1), backbone)
