"""`vgen decode`; tests/test_cli_generate.py has the run that fails and is finished by it."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from vgen import cli, video

SMALL = ("--width", "32", "--height", "32", "--frames", "5", "--steps", "2", "--dtype", "float32", "--seed", "7")


def vgen(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def latents(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tiny_checkpoint.parent)
    model = tiny_checkpoint.name
    output = str(tmp_path / "clip.png")
    assert vgen("generate", "a red ball", "--model", model, *SMALL, "-o", output, "--keep-latents").exit_code == 0
    monkeypatch.chdir(tmp_path)
    return Path("clip.png.latents.safetensors")


def test_latents_decode_from_any_folder_to_any_format(latents: Path) -> None:
    result = vgen("decode", str(latents), "-o", "again.png", "--format", "json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert (printed["outputs"], printed["seeds"], printed["timings"]["denoise"]) == (["again.png"], [7], 0)
    np.testing.assert_array_equal(video.read(Path("again.png")).frames, video.read(Path("clip.png")).frames)
    assert vgen("decode", str(latents), "-o", "again.gif").exit_code == 0
    assert latents.exists()


def test_decode_replaces_nothing_without_force(latents: Path) -> None:
    result = vgen("decode", str(latents))
    assert (result.exit_code, "clip.png exists" in result.stderr) == (1, True)
    assert vgen("decode", str(latents), "--force").exit_code == 0


@pytest.mark.parametrize("content", [None, b"", b"no latents"])
def test_file_that_is_none_is_one_clear_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.latents.safetensors"
    if content is not None:
        path.write_bytes(content)
    result = vgen("decode", str(path))
    assert result.exit_code == 1
    assert str(path) in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_a_video_is_no_latents_and_the_tip_says_what_is(tmp_path: Path) -> None:
    video.save(np.zeros((1, 16, 16, 3), np.uint8), tmp_path / "clip.mp4", fps=8)
    result = vgen("decode", str(tmp_path / "clip.mp4"))
    assert result.exit_code == 1
    assert "ends in .latents.safetensors" in result.stderr


def test_the_output_of_an_edit_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4.latents.safetensors"
    save_file({"latents": np.zeros(1, np.float32)}, path, {"vgen": "edit"})
    result = vgen("decode", str(path), "-o", "clip.avi")
    assert result.exit_code == 2
    assert "no format that vgen writes" in result.stderr
