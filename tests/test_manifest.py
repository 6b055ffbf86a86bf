import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vgen import manifest, video
from vgen.checkpoints import resolve
from vgen.errors import UsageError, VgenError
from vgen.plan import plan
from vgen.request import GenerateRequest
from vgen.runtime import Runtime

RUNTIME = Runtime(device="cpu", dtype="float32")


def built(request: GenerateRequest) -> manifest.Manifest:
    checkpoint = resolve(request.model)
    return manifest.build(
        plan(request, checkpoint),
        RUNTIME,
        checkpoint=manifest.identity(checkpoint),
        timings={"load": 1.23456},
        created=datetime(2026, 1, 2, tzinfo=UTC),
    )


@pytest.fixture
def made(tiny_checkpoint: Path) -> manifest.Manifest:
    return built(GenerateRequest(prompt='a "red"\nball 🦊', model=str(tiny_checkpoint), seed=7))


def black() -> video.Frames:
    return np.zeros((2, 16, 16, 3), np.uint8)


def test_manifest_says_what_makes_the_video_again(made: manifest.Manifest) -> None:
    assert made == json.loads(json.dumps(made))
    assert made["seed"] == 7
    assert made["timings"] == {"load": 1.235}
    assert made["versions"].keys() == {"python", "torch", "diffusers", "transformers"}
    assert all(len(file["sha256"]) == 64 for file in made["checkpoint"]["files"])
    again = manifest.request(made, {})
    # Every default is written out, so that a later change of a default changes nothing.
    assert (again.width, again.num_inference_steps, again.sampler) == (832, 50, "native")
    # The number format that "auto" stood for, so that another machine makes the same.
    assert again.dtype == "float32"
    assert built(again)["request"] == made["request"]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm"])
def test_read_from_the_video_alone(tmp_path: Path, made: manifest.Manifest, name: str) -> None:
    video.save(black(), tmp_path / name, fps=8, manifest=made)
    assert manifest.read(tmp_path / name) == made


@pytest.mark.parametrize("name", ["clip.gif", "clip.png", "clip.mp4"])
def test_read_from_beside_the_video(tmp_path: Path, made: manifest.Manifest, name: str) -> None:
    video.save(black(), tmp_path / name, fps=8)
    beside = manifest.sidecar(tmp_path / name)
    assert beside.name == f"{name}.json"
    beside.write_text(json.dumps(made))
    assert manifest.read(tmp_path / name) == made
    assert manifest.read(beside) == made


def test_video_without_a_manifest_is_one_clear_error(tmp_path: Path) -> None:
    video.save(black(), tmp_path / "clip.mp4", fps=8)
    with pytest.raises(VgenError, match=r"clip\.mp4 holds no manifest"):
        manifest.read(tmp_path / "clip.mp4")
    with pytest.raises(VgenError, match="no file"):
        manifest.read(tmp_path / "missing.mp4")


@pytest.mark.parametrize("path", [".", "/", "m.json"])
def test_folder_without_a_manifest_is_one_clear_error(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.json").mkdir()
    with pytest.raises(VgenError, match="holds no manifest"):
        manifest.read(Path(path))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"prompt": "a"}', '{"request": [], "checkpoint": {}, "versions": {}}', "\xff"],
)
def test_json_that_is_no_manifest_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_text(text, encoding="latin-1")
    with pytest.raises(VgenError, match="manifest"):
        manifest.read(tmp_path / "m.json")


def test_manifest_of_another_version_names_the_unknown_field(made: manifest.Manifest) -> None:
    made["request"]["teleport"] = True
    with pytest.raises(UsageError, match="teleport"):
        manifest.request(made, {})


def test_changes_win_and_a_length_takes_the_place_of_another(made: manifest.Manifest) -> None:
    changed = manifest.request(made, {"seconds": 1.0, "seed": None})
    assert (changed.seconds, changed.num_frames, changed.seed) == (1.0, None, None)


def test_image_that_changed_is_an_error_unless_it_is_given(tmp_path: Path, tiny_expanded: Path) -> None:
    image = tmp_path / "first.png"
    Image.new("RGB", (64, 64)).save(image)
    made = built(GenerateRequest(prompt="a", model=str(tiny_expanded), image=image))
    assert manifest.request(made, {}).image == image
    Image.new("RGB", (64, 64), "red").save(image)
    with pytest.raises(VgenError, match="has changed"):
        manifest.request(made, {})
    assert manifest.request(made, {"image": image}).image == image
    del made["image_sha256"]
    with pytest.raises(VgenError, match="has changed"):
        manifest.request(made, {})


def test_other_weights_and_libraries_are_told(made: manifest.Manifest, tiny_checkpoint: Path) -> None:
    checkpoint = resolve(str(tiny_checkpoint))
    assert manifest.differences(made, checkpoint) == []
    made["checkpoint"]["files"][0]["sha256"] = "0" * 64
    made["versions"]["torch"] = "1.0"
    weights, library = manifest.differences(made, checkpoint)
    assert "weights" in weights
    assert "torch 1.0" in library


def test_checkpoint_that_moved_is_still_the_same(made: manifest.Manifest, tiny_checkpoint: Path) -> None:
    moved = replace(resolve(str(tiny_checkpoint)), name="elsewhere")
    assert manifest.differences(made, moved) == []
