import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vgen import cli

SMALL = ("--width", "32", "--height", "32", "--frames", "1", "--steps", "1", "--dtype", "float32")


@pytest.mark.parametrize("name", ["clip.mp4", "clip.png"])
def test_video_tells_how_it_was_made(tmp_path: Path, tiny_checkpoint: Path, name: str) -> None:
    path = str(tmp_path / name)
    made = CliRunner().invoke(
        cli.app, ["generate", "a red ball", "--model", str(tiny_checkpoint), *SMALL, "--seed", "7", "-o", path]
    )
    assert made.exit_code == 0, made.stderr
    text = CliRunner().invoke(cli.app, ["info", path]).stdout
    assert "prompt: a red ball" in text
    assert "seed: 7" in text
    facts = json.loads(CliRunner().invoke(cli.app, ["info", path, "--format", "json"]).stdout)
    assert facts == json.loads(Path(f"{path}.json").read_text())


def test_checkpoint_tells_what_it_takes(tiny_checkpoint: Path) -> None:
    facts = json.loads(CliRunner().invoke(cli.app, ["info", str(tiny_checkpoint), "--format", "json"]).stdout)
    assert facts["family"] == "wan"
    assert facts["rules"]["frame_multiple"] == 4
    assert "model_index.json" in [file["path"] for file in facts["files"]]
    assert "family: wan" in CliRunner().invoke(cli.app, ["info", str(tiny_checkpoint)]).stdout


@pytest.mark.parametrize(
    ("what", "code", "says"),
    [
        ("toylnd", 2, "toyland"),
        ("wan2.1-1.3", 2, 'Did you mean "wan2.1-1.3b"?'),
        ("no/such.mp4", 1, "no/such.mp4"),
        (".", 1, "holds no manifest"),
    ],
)
def test_what_is_neither_is_one_clear_error(what: str, code: int, says: str) -> None:
    result = CliRunner().invoke(cli.app, ["info", what])
    assert result.exit_code == code
    assert says in result.stderr


def test_a_hub_id_with_a_dot_is_a_checkpoint() -> None:
    result = CliRunner().invoke(cli.app, ["info", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"])
    assert result.exit_code == 0, result.stderr
    assert "name: wan2.1-1.3b" in result.stdout
