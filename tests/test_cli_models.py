"""`vgen models` against a stand-in for the hub, and a video from a checkpoint that is not here yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests import tiny_lora
from tests.hub_server import TINY, TOKEN, Hub, Repository
from vgen import checkpoints, cli, hub
from vgen.checkpoints import catalogue

ROOT = Path(__file__).parent.parent
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SMALL = ("--width", "32", "--height", "32", "--frames", "1", "--steps", "1", "--dtype", "float32", "--seed", "7")


def vgen(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def test_list_tells_every_name_what_it_needs_and_whether_it_is_here(online: Hub) -> None:
    lines = vgen("models", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == checkpoints.names()
    (wan,) = (line for line in lines if line.startswith("wan2.1-1.3b "))
    assert "28.9 GB" in wan
    assert "Apache-2.0" in wan
    assert "not downloaded" in wan
    assert online.asked == []
    listed = json.loads(vgen("models", "list", "--format", "json").stdout)
    states = {entry["name"]: entry["state"] for entry in listed}
    assert states["toyland"] == "part of vgen"
    assert states["wan2.1-14b-4step"] == "not downloaded"
    assert states["consisid"] == "cannot run yet"


def test_show_tells_what_would_be_downloaded_before_anything_is(online: Hub) -> None:
    facts = json.loads(vgen("models", "show", TINY, "--format", "json").stdout)
    assert facts["download"]["commit"] == online.repositories[TINY].commit("main")
    missing = {file["path"] for file in facts["download"]["missing"]}
    assert WEIGHTS in missing
    assert not [path for path in missing if path.endswith((".bin", ".mp4"))]
    assert not [path for path in online.paths() if path.endswith(".safetensors")]
    text = vgen("models", "show", TINY).stdout
    assert "to_download: " in text
    assert "state: not downloaded" in text
    vgen("models", "pull", TINY)
    assert "download" not in json.loads(vgen("models", "show", TINY, "--format", "json").stdout)


def test_show_works_without_a_connection(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = vgen("models", "show", "wan2.1-1.3b")
    assert result.exit_code == 0
    assert "download_gb: 28.9" in result.stdout
    assert "HF_HUB_OFFLINE" in result.stderr


def test_pull_path_and_verify(online: Hub) -> None:
    assert vgen("models", "path", "wan2.1-1.3b").exit_code == 1
    result = vgen("models", "pull", TINY)
    assert result.exit_code == 0, result.stderr
    folder = Path(result.stdout.strip())
    assert (folder / WEIGHTS).is_file()
    assert f"Downloading {TINY}: " in result.stderr
    assert vgen("models", "path", TINY).stdout.strip() == str(folder)
    assert vgen("models", "verify", TINY, "--full").stdout == f"{TINY} is whole: sizes and hashes match.\n"
    blob = (folder / WEIGHTS).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    assert vgen("models", "verify", TINY).exit_code == 0
    damaged = vgen("models", "verify", TINY, "--full")
    assert damaged.exit_code == 1
    assert f"vgen models pull --full {TINY}" in damaged.stderr
    assert vgen("models", "pull", "--full", TINY).exit_code == 0
    assert vgen("models", "verify", TINY, "--full").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["pull", "toyland"], 2, "a part of vgen: there is nothing to pull"),
        (["pull", "wan2.1-1.3"], 2, 'Did you mean "wan2.1-1.3b"?'),
        (["pull", "someone/none"], 1, 'There is no "someone/none" on the hub'),
        (["pull", TINY, "--revision", "v9"], 1, 'has no revision "v9"'),
        (["verify", "wan2.1-1.3b"], 1, "vgen models pull"),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(arguments: list[str], code: int, says: str, online: Hub) -> None:
    result = vgen("models", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert says in result.stderr


@pytest.fixture
def named(online: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a name of the catalogue that stands for the checkpoint that is served."""
    known = catalogue.read()
    entry = {"family": "wan", "repo": TINY, "licence": "Apache-2.0", "sizes": [[32, 32]], "can": ["text-to-video"]}
    added = {**known, "checkpoints": {**known["checkpoints"], "tiny-1": entry}}
    monkeypatch.setattr(catalogue, "read", lambda: added)
    return "tiny-1"


def test_generate_gets_a_model_that_is_not_here_and_says_how_much_first(
    named: str, online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    plan = vgen("generate", "a red ball", "--model", named, *SMALL, "--dry-run")
    assert plan.exit_code == 0, plan.stderr
    assert "to be downloaded" in plan.stdout
    assert online.asked == []
    result = vgen("generate", "a red ball", "--model", named, *SMALL, "-o", str(tmp_path / "ball.mp4"))
    assert result.exit_code == 0, result.stderr
    assert result.stderr.index(f"Downloading {TINY}: ") < result.stderr.index("Denoising")
    made = (tmp_path / "ball.mp4.json").read_text()
    commit = online.repositories[TINY].commit("main")
    assert json.loads(made)["checkpoint"]["revision"] == commit
    assert json.loads(made)["request"]["model"] == f"{named}@{commit}"
    assert [headers for _, _, headers in online.asked if headers.get("Authorization") == f"Bearer {TOKEN}"]
    for text in (made, result.stdout, result.stderr, (tmp_path / "ball.mp4").read_bytes().decode("latin-1")):
        assert TOKEN not in text
    # The same again, from the manifest, without a connection.
    online.asked.clear()
    again = vgen("generate", "--from", str(tmp_path / "ball.mp4"), "-o", str(tmp_path / "again.mp4"))
    assert again.exit_code == 0, again.stderr
    assert "Warning" not in again.stderr
    assert online.asked == []


def test_a_preset_comes_with_its_lora_and_makes_its_steps(
    named: str, online: Hub, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = catalogue.read()
    entry = {
        "base": named,
        "loras": [{"repo": "someone/loras", "file": "few.safetensors"}],
        "defaults": {"num_inference_steps": 2, "guidance_scale": 1.0, "sampler": "lcm", "timesteps": [1000, 500]},
    }
    added = {**known, "checkpoints": {**known["checkpoints"], "tiny-2step": entry}}
    monkeypatch.setattr(catalogue, "read", lambda: added)
    few = tiny_lora.save(tmp_path / "few.safetensors", tiny_lora.wan(tiny_checkpoint)).read_bytes()
    online.repositories["someone/loras"] = Repository({"main": {"few.safetensors": few, "other.safetensors": few}})
    shown = json.loads(vgen("models", "show", "tiny-2step", "--format", "json").stdout)
    assert [lora["file"] for lora in shown["loras"]] == ["someone/loras/few.safetensors"]
    assert {"few.safetensors", WEIGHTS} <= {file["path"] for file in shown["download"]["missing"]}
    assert vgen("models", "pull", "tiny-2step").exit_code == 0
    assert vgen("models", "verify", "tiny-2step", "--full").exit_code == 0
    online.asked.clear()
    size = ("--width", "32", "--height", "32", "--frames", "1", "--dtype", "float32")
    result = vgen("generate", "a", "--model", "tiny-2step", *size, "-o", str(tmp_path / "a.mp4"))
    assert result.exit_code == 0, result.stderr
    assert online.asked == []
    assert "LoRA few.safetensors: 20 of 20 layers matched." in result.stderr
    made = json.loads((tmp_path / "a.mp4.json").read_text())
    assert made["request"]["sampler"] == "lcm"
    (lora,) = made["checkpoint"]["loras"]
    assert lora["revision"] == online.repositories["someone/loras"].commit("main")
    again = vgen("generate", "--from", str(tmp_path / "a.mp4"), "-o", str(tmp_path / "b.mp4"))
    assert again.exit_code == 0, again.stderr
    assert "Warning" not in again.stderr
    # One that is asked for is added, and what its short name stood for is written down.
    online.repositories["someone/style"] = Repository({"main": {"deep/style.safetensors": few}})
    both = vgen(
        "generate", "--from", str(tmp_path / "a.mp4"), "--lora", "someone/style", "-o", str(tmp_path / "c.mp4")
    )
    assert both.exit_code == 0, both.stderr
    commit = online.repositories["someone/style"].commit("main")
    request = json.loads((tmp_path / "c.mp4.json").read_text())["request"]
    assert request["lora"] == [f"someone/style/deep/style.safetensors@{commit}:1.0"]
    weights = hub.folder("someone/loras", lora["revision"]) / "few.safetensors"
    weights.resolve().write_bytes(few[:-1])
    broken = vgen("models", "verify", "tiny-2step")
    assert broken.exit_code == 1
    assert "few.safetensors has" in broken.stderr


def test_a_model_that_vgen_cannot_run_is_refused_before_it_is_downloaded(online: Hub, tmp_path: Path) -> None:
    result = vgen("generate", "a", "--model", "fastwan2.1-1.3b", "-o", str(tmp_path / "a.mp4"))
    assert result.exit_code == 1
    assert "cannot run it yet" in result.stderr
    assert online.asked == []


def test_the_hubs_own_variables_say_where_to_and_from(online: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": online.endpoint, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "vgen", "models", "pull", TINY]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(tmp_path / "home")
    assert (Path(run.stdout.strip()) / WEIGHTS).is_file()
