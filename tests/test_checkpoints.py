from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st

from vgen import checkpoints
from vgen.checkpoints import Checkpoint, describe_files, names, resolve, verify
from vgen.errors import CheckpointError, UsageError, VgenError


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def listed(folder: Path) -> Checkpoint:
    return replace(resolve(str(folder)), name="tiny", source="embedded", files=describe_files(folder))


def weights(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def test_toyland_is_known_by_name() -> None:
    checkpoint = resolve("toyland")
    assert "toyland" in names()
    assert (checkpoint.name, checkpoint.family, checkpoint.source) == ("toyland", "wan", "embedded")
    assert checkpoint.knows.endswith(".")
    assert checkpoint.defaults.max_sequence_length == 64


def test_the_defaults_of_every_name_are_legal() -> None:
    from vgen.request import GenerateRequest, plan

    for name in names():
        plan(GenerateRequest(prompt="a", model=name), resolve(name))


@pytest.mark.parametrize("name", ["toylnd", "Toyland", "toy-land"])
def test_a_name_that_is_close_gets_a_suggestion(name: str) -> None:
    with pytest.raises(UsageError, match='Did you mean "toyland"'):
        resolve(name)


@given(st.text(st.characters(exclude_characters="/"), max_size=60))
@example("a" * 10_000)
@example("~nobody-of-this-name")
@example("a\0b")
def test_any_other_name_is_an_error_for_people(name: str) -> None:
    assume(name not in names() and checkpoints._existing(name) is None)
    with pytest.raises(VgenError):
        resolve(name)


def test_a_folder_is_described_by_its_own_files(tiny_checkpoint: Path, tiny_expanded: Path) -> None:
    checkpoint = resolve(str(tiny_checkpoint))
    assert (checkpoint.family, checkpoint.source, checkpoint.folder) == ("wan", "folder", tiny_checkpoint)
    assert (checkpoint.rules.size_multiple, checkpoint.rules.frame_multiple) == (16, 4)
    # rope_max_seq_len 64: so many patches of 16 pixels, and so many latent frames.
    assert (checkpoint.rules.max_size, checkpoint.rules.max_frames) == (1024, 253)
    assert not checkpoint.rules.known_frames
    assert resolve(str(tiny_expanded)).rules.known_frames


def test_a_vae_of_another_scale_gives_other_rules(folder: Path) -> None:
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "scale_factor_spatial": 16, "scale_factor_temporal": 8}))
    rules = resolve(str(folder)).rules
    assert (rules.size_multiple, rules.frame_multiple) == (32, 8)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in diffusers layout: it has no model_index\.json"):
        resolve(str(tmp_path))
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="a JSON object is expected"):
        resolve(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="Cannot read"):
        resolve(str(tmp_path))


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="is a file, but a checkpoint is a folder"):
        resolve(str(tmp_path / "model.safetensors"))


def test_an_unknown_family_is_named(folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableAudioPipeline"}))
    with pytest.raises(CheckpointError, match="is a StableAudioPipeline, a family that vgen cannot run") as caught:
        resolve(str(folder))
    assert "WanPipeline" in str(caught.value.tip)


def test_what_is_whole_verifies(folder: Path) -> None:
    verify(resolve(str(folder)))
    verify(listed(folder))


def test_a_missing_file_is_named(folder: Path) -> None:
    checkpoint = listed(folder)
    weights(folder).unlink()
    for which in (checkpoint, resolve(str(folder))):
        with pytest.raises(CheckpointError, match=r"transformer.* (is missing|has no weights)"):
            verify(which, full=False)


def test_a_truncated_file_is_named(folder: Path) -> None:
    checkpoint = listed(folder)
    os.truncate(weights(folder), weights(folder).stat().st_size - 1)
    for which in (checkpoint, resolve(str(folder))):
        with pytest.raises(
            CheckpointError, match=r"diffusion_pytorch_model.safetensors has \d+ bytes, but \d+ are exp"
        ):
            verify(which, full=False)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64])
def test_weights_that_are_no_safetensors_are_named(content: bytes, folder: Path) -> None:
    weights(folder).write_bytes(content)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        verify(resolve(str(folder)))


def test_a_flipped_byte_is_found(folder: Path) -> None:
    checkpoint = listed(folder)
    content = bytearray(weights(folder).read_bytes())
    content[-100] ^= 1
    weights(folder).write_bytes(content)
    verify(checkpoint, full=False)
    with pytest.raises(CheckpointError, match="is damaged: its sha256 is not"):
        verify(checkpoint)


def test_a_missing_component_and_a_missing_shard_are_named(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer is missing or empty"):
        verify(resolve(str(folder)))
    shutil.rmtree(folder / "scheduler")
    (folder / "transformer" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors is missing"):
        verify(resolve(str(folder)))


def test_a_missing_folder_is_named(folder: Path) -> None:
    checkpoint = listed(folder)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match='The checkpoint "tiny" is missing'):
        verify(checkpoint)


def snapshot(folder: Path, cache: Path, commit: str = "0" * 39 + "1") -> Path:
    """Lay `folder` out as the hub's cache holds someone/tiny: links to blobs that are named by their sha256."""
    root = cache / "models--someone--tiny"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        blob = root / "blobs" / checkpoints.sha256(path)
        shutil.copy(path, blob)
        link = root / "snapshots" / commit / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return root / "snapshots" / commit


def test_a_hub_id_in_the_cache_is_used_without_a_connection(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    cached = snapshot(folder, tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint = resolve("someone/tiny")
    assert (checkpoint.source, checkpoint.repo, checkpoint.revision) == ("hub", "someone/tiny", cached.name)
    assert checkpoint.folder == cached
    verify(checkpoint)
    content = bytearray(weights(cached).read_bytes())
    content[-1] ^= 1
    weights(cached).write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        verify(checkpoint)
    with pytest.raises(CheckpointError, match='Cannot get "someone/other" from the hub'):
        resolve("someone/other")


def test_fetch_asks_the_hub_for_what_is_missing_and_for_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[object] = []
    cached = snapshot(folder, tmp_path / "hub")
    checkpoint = replace(resolve(str(cached)), source="hub", repo="someone/tiny", revision=cached.name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(cached))
    checkpoints.fetch(checkpoint)
    assert asked == []
    weights(cached).unlink()
    checkpoints.fetch(checkpoint)
    ((arguments, options),) = asked  # type: ignore[misc]
    assert arguments == ("someone/tiny",)
    assert options["revision"] == cached.name
    components = ["scheduler", "text_encoder", "tokenizer", "transformer", "vae"]
    assert sorted(options["allow_patterns"]) == ["model_index.json", *(f"{name}/*" for name in components)]


def test_a_catalogue_that_lost_its_link_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints.yaml").write_text("../checkpoints.yaml")
    monkeypatch.setattr(checkpoints.importlib.resources, "files", lambda package: tmp_path)
    checkpoints._catalogue.cache_clear()
    try:
        with pytest.raises(CheckpointError, match=r'it says "\.\./checkpoints\.yaml"') as caught:
            resolve("toyland")
        assert "where links were lost" in str(caught.value.tip)
    finally:
        checkpoints._catalogue.cache_clear()


def test_the_hash_command_prints_the_files_of_a_folder(folder: Path) -> None:
    command = [sys.executable, "-m", "vgen.checkpoints", "hash", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stderr
    printed = yaml.safe_load(run.stdout)["files"]
    assert tuple(checkpoints.CheckpointFile(**file) for file in printed) == describe_files(folder)
