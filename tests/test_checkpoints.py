from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st

from vgen import checkpoints, integrity
from vgen.checkpoints import Checkpoint, catalogue, names, resolve, verification, verify
from vgen.errors import CheckpointError, UsageError, VgenError
from vgen.integrity import describe_files


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
    assert checkpoint.defaults.max_sequence_length == 48


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


def test_the_embedded_checkpoint_has_no_revisions() -> None:
    with pytest.raises(UsageError, match='"toyland" comes with vgen and has no revision "v2"'):
        resolve("toyland@v2")


def test_a_folder_is_described_by_its_own_files(tiny_checkpoint: Path, tiny_expanded: Path) -> None:
    checkpoint = resolve(str(tiny_checkpoint))
    assert (checkpoint.family, checkpoint.source, checkpoint.folder) == ("wan", "folder", tiny_checkpoint)
    assert (checkpoint.rules.size_multiple, checkpoint.rules.frame_multiple) == (16, 4)
    # rope_max_seq_len 64: so many patches of 16 pixels, and so many latent frames.
    assert (checkpoint.rules.max_size, checkpoint.rules.max_frames) == (1024, 253)
    assert checkpoint.can.text_to_video
    assert not checkpoint.can.known_frames
    assert resolve(str(tiny_expanded)).can.known_frames


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


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("transformer", {"patch_size": []}),
        ("transformer", {"rope_max_seq_len": "x"}),
        ("vae", {"scale_factor_spatial": "8"}),
    ],
)
def test_settings_of_another_kind_are_damage(folder: Path, part: str, changes: dict[str, object]) -> None:
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=r"A config\.json of .* is damaged"):
        resolve(str(folder))


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


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"\xff" * 64,
        *(
            struct.pack("<Q", len(header)) + header
            for header in (b"[]", b'{"a": 1}', b'{"a": {"data_offsets": []}}', b'{"a": {"data_offsets": ["b", "c"]}}')
        ),
    ],
)
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


def test_weights_as_a_pickle_are_refused_with_the_reason(folder: Path) -> None:
    weights(folder).rename(weights(folder).with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"as a pickle \(diffusion_pytorch_model\.bin\)") as caught:
        verify(resolve(str(folder)))
    assert "can run whatever" in str(caught.value)
    assert "safe_serialization=True" in str(caught.value.tip)


def test_small_checkpoints_are_hashed_by_default_and_large_ones_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = listed(folder)
    content = bytearray(weights(folder).read_bytes())
    content[-100] ^= 1
    weights(folder).write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        verify(checkpoint)
    monkeypatch.setattr(verification, "HASHED_AT_LOAD", 1000)
    verify(checkpoint)
    with pytest.raises(CheckpointError, match="is damaged"):
        verify(checkpoint, full=True)


def test_a_catalogue_that_lost_its_link_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints.yaml").write_text("../checkpoints.yaml")
    monkeypatch.setattr(catalogue.importlib.resources, "files", lambda package: tmp_path)
    catalogue.read.cache_clear()
    try:
        with pytest.raises(CheckpointError, match=r'it says "\.\./checkpoints\.yaml"') as caught:
            resolve("toyland")
        assert "where links were lost" in str(caught.value.tip)
    finally:
        catalogue.read.cache_clear()


def test_the_hash_command_prints_the_files_of_a_folder(folder: Path) -> None:
    command = [sys.executable, "-m", "vgen.checkpoints", "hash", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stderr
    printed = yaml.safe_load(run.stdout)["files"]
    assert tuple(integrity.CheckpointFile(**file) for file in printed) == describe_files(folder)
