from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from diffusers import LTX2ImageToVideoPipeline, LTX2Pipeline
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel
from PIL import Image

from tests import tiny_ltx_2
from tests.parity import TOLERANCE, Lengths, difference, loaded, num_parameters, on_meta, planned, reinstall
from vgen import video
from vgen.backbones import Shot
from vgen.backbones.ltx_2 import LTX2
from vgen.pipelines import run, text_to_video
from vgen.pipelines.text_to_video import generate
from vgen.runtime import noise_generator

PROMPT = "a red ball moves left"
SIZE: dict[str, Any] = {"width": 96, "height": 64, "num_frames": 9}
STEPS = {"num_inference_steps": 3}
# What of the stock pipeline's guidance the backbone's docstring leaves out.
PLAIN: dict[str, Any] = {
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_scale": None,
    "audio_stg_scale": None,
    "audio_modality_scale": None,
    "audio_guidance_rescale": None,
    "spatio_temporal_guidance_blocks": None,
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ltx-2")
    return cache(lambda version: tiny_ltx_2.build(folder / version, version=version))


def stock(pipeline: type, folder: Path, **values: Any) -> tuple[Any, torch.Tensor]:
    """Return the frames and the audio of a stock pipeline."""
    made = pipeline.from_pretrained(folder)  # type: ignore[attr-defined]
    made.set_progress_bar_config(disable=True)
    out = made(prompt=PROMPT, generator=noise_generator(7), **{**PLAIN, **values})
    return out.frames, out.audio


def taken_apart(backbone: LTX2, latents: torch.Tensor, shot: Shot) -> tuple[torch.Tensor, torch.Tensor]:
    """Return video and audio latents as the stock pipeline does: not normalised, audio as [B, C, L, M]."""
    frames, audio = backbone._split(latents, shot)
    mean, std = backbone._statistics()
    audio = audio * backbone.audio_vae.latents_std + backbone.audio_vae.latents_mean
    return frames * std + mean, audio.unflatten(2, (2, 4)).transpose(1, 2)


def shot_of(fps: float = 24) -> Shot:
    return Shot(**SIZE, fps=fps, generator=noise_generator(7))


@pytest.mark.parametrize(
    ("version", "guidance_scale", "fps", "sampler"),
    [
        ("2.0", 1.0, 24, "euler"),
        ("2.0", 3.0, 24, "euler"),
        ("2.0", 3.0, 10, "native"),
        ("2.3", 3.0, 24, "euler"),
    ],
)
def test_text_gives_the_latents_of_stock_diffusers(
    version: str, guidance_scale: float, fps: int, sampler: str, built: Any
) -> None:
    folder, shot = built(version), shot_of(fps)
    settings = {**SIZE, **STEPS, "guidance_scale": guidance_scale, "negative_prompt": "blue cube"}
    backbone = loaded(folder)
    latents = generate(planned(folder, PROMPT, seed=7, sampler=sampler, fps=fps, **settings), backbone).latents
    frames, audio = stock(LTX2Pipeline, folder, output_type="latent", frame_rate=fps, **settings)
    found_frames, found_audio = taken_apart(backbone, latents, shot)
    assert difference(found_frames, frames) <= TOLERANCE
    assert difference(found_audio, audio) <= TOLERANCE
    other = generate(planned(folder, "blue", seed=7, sampler=sampler, fps=fps, **settings), backbone).latents
    other_frames, other_audio = taken_apart(backbone, other, shot)
    assert min(difference(found_frames, other_frames), difference(found_audio, other_audio)) > 10 * TOLERANCE


@pytest.mark.parametrize(("version", "guidance_scale"), [("2.0", 1.0), ("2.0", 3.0), ("2.3", 3.0)])
def test_an_image_gives_the_latents_of_stock_diffusers(
    version: str, guidance_scale: float, built: Any, tmp_path: Path
) -> None:
    folder = built(version)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    image.save(tmp_path / "first.png")
    settings = {**SIZE, **STEPS, "guidance_scale": guidance_scale}
    backbone = loaded(folder)
    made = planned(folder, PROMPT, seed=7, image=tmp_path / "first.png", **settings)
    latents = generate(made, backbone).latents
    options = {"image": image, "image_crf": 0, "use_cross_timestep": version == "2.3"}
    frames, audio = stock(LTX2ImageToVideoPipeline, folder, output_type="latent", **options, **settings)
    found_frames, found_audio = taken_apart(backbone, latents, shot_of())
    assert difference(found_frames, frames) <= TOLERANCE
    assert difference(found_audio, audio) <= TOLERANCE
    without = generate(planned(folder, PROMPT, seed=7, **settings), backbone).latents
    assert difference(latents[:, :, 1:], without[:, :, 1:]) > 10 * TOLERANCE


def test_frames_and_sound_are_those_of_stock_diffusers_and_written(built: Any, tmp_path: Path) -> None:
    folder = built("2.0")
    settings = {**SIZE, **STEPS, "guidance_scale": 1.0}
    made = planned(folder, PROMPT, seed=7, device="cpu", dtype="float32", **settings)
    generation = generate(made, loaded(folder))
    frames, audio = stock(LTX2Pipeline, folder, output_type="np", **settings)
    assert generation.frames.shape == (9, 64, 96, 3)
    assert np.abs(generation.frames - (frames[0] * 255).round()).max() <= 1
    assert generation.sound is not None and generation.sound.sampling_rate == 24000
    assert np.abs(generation.sound.waveform - audio[0].clamp(-1, 1).numpy()).max() <= TOLERANCE
    assert generation.sound.waveform.std() > 1e-3

    job = run.Job(plan=made, output=tmp_path / "clip.mp4")
    run.generate([job], watch=run.Watch(), keep_latents=True)
    seconds = len(generation.sound.waveform[0]) / 24000
    assert heard(job.output).shape[1] / 24000 == pytest.approx(seconds, abs=0.1)
    assert np.array_equal(video.read(job.output).frames.shape, generation.frames.shape)

    # What was saved is decoded to the same, sound and all.
    latents = Path(f"{job.output}.latents.safetensors")
    again = text_to_video.decode_latents(latents, loaded(folder, decode_only=True))
    assert np.array_equal(again.frames, generation.frames)
    assert again.sound is not None and np.array_equal(again.sound.waveform, generation.sound.waveform)


def heard(path: Path) -> np.ndarray:
    """Return the sound [2, samples] of a file at 24 kHz."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path), "-map", "0:a"]
    raw = ["-f", "f32le", "-ac", "2", "-ar", "24000", "pipe:1"]
    done = subprocess.run([*command, *raw], capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.float32).reshape(-1, 2).T


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_sound_is_heard_again(suffix: str, tmp_path: Path) -> None:
    time = np.arange(24000, dtype=np.float32) / 24000
    left, right = 0.5 * np.sin(2 * np.pi * 440 * time), 0.5 * np.sin(2 * np.pi * 880 * time)
    sound = video.Sound(waveform=np.stack([left, right]), sampling_rate=24000)
    frames = np.zeros((8, 32, 32, 3), np.uint8)
    path = tmp_path / f"clip{suffix}"
    video.save(frames, path, fps=8, manifest={"seed": 1}, sound=sound)
    read = video.read(path)
    assert len(read.frames) == 8 and json.loads(read.tags[video.MANIFEST_TAG]) == {"seed": 1}
    for channel, hertz in zip(heard(path)[:, 4000:20000], (440, 880), strict=True):
        spectrum = np.abs(np.fft.rfft(channel))
        assert np.fft.rfftfreq(len(channel), 1 / 24000)[spectrum.argmax()] == pytest.approx(hertz, abs=2)
        assert channel.std() == pytest.approx(0.5 / 2**0.5, rel=0.05)


def test_a_format_without_sound_is_told(built: Any, tmp_path: Path) -> None:
    made = planned(built("2.0"), PROMPT, seed=7, **SIZE, num_inference_steps=2, guidance_scale=1.0)
    report = run.generate([run.Job(plan=made, output=tmp_path / "clip.gif")], watch=run.Watch())
    assert ".gif has no place for the sound" in report.warnings[-1]
    assert (tmp_path / "clip.gif").is_file()


def test_video_and_audio_are_joined_without_loss(built: Any) -> None:
    backbone, shot = loaded(built("2.0"), decode_only=True), shot_of()
    latents = backbone.noise(shot)
    assert latents.shape == (1, 8, 2 + 2, 2, 3)  # 9 tokens of 8 numbers fill one and a half frames of 8 * 2 * 3
    frames, audio = backbone._split(latents, shot)
    assert audio.shape == (1, 9, 8)  # 0.375 s of 25 spectra
    assert torch.equal(backbone._join(frames, audio), latents)
    assert (latents == 0).sum() == 2 * 8 * 2 * 3 - 9 * 8


def test_the_grid_and_the_slots_are_what_the_model_sees(built: Any) -> None:
    backbone, shot = loaded(built("2.0")), shot_of()
    assert backbone.token_grid(9, 64, 96) == (2, 2, 3)
    assert len(backbone.blocks()) == len(backbone.attention_slots()) == 2
    with torch.inference_mode():
        latents, text, sigma = backbone.noise(shot), backbone.encode_prompt([PROMPT]), torch.tensor(0.5)
        lengths = [Lengths(slot) for slot in backbone.attention_slots()]
        before = backbone.velocity(latents, sigma, text[0], shot=shot)
        assert [look.seen for look in lengths] == [[(12, backbone.num_text_tokens())]] * len(lengths)
        assert (before[latents == 0] == 0).all()
        reinstall(backbone.attention_slots())
        assert torch.equal(backbone.velocity(latents, sigma, text[0], shot=shot), before)


# The configuration in the header of ltx-2-19b-dev.safetensors, which diffusers' scripts/convert_ltx2_to_diffusers.py
# writes for LTX-2.0: the class's defaults but for the kind of rotary positions. The paper says 14B parameters for the
# video stream and 5B for the audio stream (arXiv:2601.03233); "19b" is in the name.
def test_the_real_configuration_has_the_published_size() -> None:
    backbone = LTX2.__new__(LTX2)
    backbone.transformer = on_meta(LTX2VideoTransformer3DModel, rope_type="split")
    assert num_parameters(backbone.transformer) == pytest.approx(19e9, rel=0.02)
    assert len(backbone.blocks()) == len(backbone.attention_slots()) == 48
    assert all(hasattr(slot, "set_processor") for slot in backbone.attention_slots())
