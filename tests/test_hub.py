"""Pulling, with huggingface_hub's own client, from a stand-in for the hub on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests import hub_server
from tests.hub_server import NOT_NEEDED, TOKEN, Hub, Repository
from vgen import backbones, checkpoints, files, hub, runtime
from vgen.checkpoints import fetch, pull, resolve, verify
from vgen.errors import CheckpointError, UsageError
from vgen.hub import Listing, Progress, RemoteFile
from vgen.loras import Lora

NAME = hub_server.TINY
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def main(online: Hub) -> dict[str, bytes]:
    return online.repositories[NAME].revisions["main"]


def needed(online: Hub) -> dict[str, bytes]:
    return {path: data for path, data in main(online).items() if path not in NOT_NEEDED}


def commit(online: Hub) -> str:
    return online.repositories[NAME].commit("main")


def pulled(**options: Any) -> Path:
    folder = pull(resolve(NAME), **options).folder
    assert folder is not None
    return folder


def test_what_is_needed_arrives_and_nothing_else(online: Hub) -> None:
    told: list[tuple[str, int]] = []
    progress = Progress(
        on_begin=lambda listing, missing: told.append((listing.repo, missing)),
        on_bytes=lambda num_bytes: told.append(("bytes", num_bytes)),
        on_end=lambda: told.append(("end", 0)),
    )
    checkpoint = pull(resolve(NAME), progress)
    assert checkpoint.folder is not None
    here = {path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.folder.rglob("*") if path.is_file()}
    assert here == needed(online).keys()
    assert (checkpoint.revision, checkpoint.folder.name) == (commit(online), commit(online))
    assert told[0][0] == NAME
    assert told[-1] == ("end", 0)
    # The little that told the family was here before: of the rest, every byte is told.
    assert sum(num_bytes for what, num_bytes in told if what == "bytes") == told[0][1] > 100_000
    verify(checkpoint, full=True)
    backbones.load(checkpoint, runtime.choose("cpu", "float32"))


def test_the_lock_has_the_hubs_own_hashes_and_the_commit(online: Hub) -> None:
    checkpoint = pull(resolve(NAME))
    text = (Path(constants.HF_HUB_CACHE) / "models--someone--tiny" / "vgen-lock.json").read_text()
    locked = json.loads(text)["revisions"]["main"]
    assert locked["commit"] == commit(online)
    expected = {path: (len(data), hashlib.sha256(data).hexdigest()) for path, data in needed(online).items()}
    assert {file["path"]: (file["size"], file["sha256"]) for file in locked["files"]} == expected
    assert {file.path: (file.size, file.sha256) for file in checkpoint.files} == expected


def test_pulling_again_asks_for_no_file(online: Hub) -> None:
    pulled()
    online.asked.clear()
    pulled()
    assert online.paths() == []
    online.asked.clear()
    fetch(resolve(NAME))
    assert online.asked == []


def test_a_cut_connection_is_resumed_where_it_broke(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the client writes at once: what it has written is kept.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    online.cut[WEIGHTS] = 50_500
    folder = pulled()
    assert (folder / WEIGHTS).read_bytes() == main(online)[WEIGHTS]
    ranges = [headers.get("Range") for verb, path, headers in online.asked if verb == "GET" and path.endswith(WEIGHTS)]
    assert ranges == [None, "bytes=50000-"]


def test_a_pull_that_failed_goes_on_with_what_is_missing(online: Hub) -> None:
    online.broken.add("vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="Cannot get") as caught:
        pulled()
    assert "what arrived whole is kept" in str(caught.value.tip)
    with pytest.raises(CheckpointError, match=r"vae .*has no weights|vae.* has no weights"):
        verify(resolve(NAME))
    online.broken.clear()
    online.asked.clear()
    pulled()
    assert set(online.paths("HEAD")) == {"vae/diffusion_pytorch_model.safetensors"}
    verify(resolve(NAME), full=True)


@pytest.mark.parametrize("path", [WEIGHTS, "scheduler/scheduler_config.json"])
def test_what_does_not_have_the_hubs_hash_is_removed(path: str, online: Hub) -> None:
    data = bytearray(main(online)[path])
    data[len(data) // 2] ^= 1
    online.wrong[path] = bytes(data)
    checkpoint = replace(resolve(NAME), folder=None) if path == WEIGHTS else _unseen()
    with pytest.raises(CheckpointError, match=f"{path} arrived damaged and was removed"):
        pull(checkpoint)
    assert hub.lock(NAME) is None
    assert not (hub.folder(NAME, commit(online)) / path).exists()
    online.wrong.clear()
    verify(pull(resolve(NAME)), full=True)


def _unseen() -> checkpoints.Checkpoint:
    """Return the checkpoint as a name of the catalogue is: without anything of it in the cache."""
    return replace(resolve("wan2.1-1.3b"), name=NAME, repo=NAME)


def test_a_shard_that_the_hub_lacks_is_named(online: Hub) -> None:
    weights = main(online).pop(WEIGHTS)
    main(online)["transformer/diffusion_pytorch_model-00001-of-00002.safetensors"] = weights
    shards = {"a": "diffusion_pytorch_model-00001-of-00002.safetensors", "b": "lost.safetensors"}
    main(online)["transformer/diffusion_pytorch_model.safetensors.index.json"] = json.dumps(
        {"weight_map": shards}
    ).encode()
    with pytest.raises(CheckpointError, match=r"is incomplete on the hub: transformer/lost\.safetensors is missing"):
        pulled()


def test_a_file_that_vanishes_is_named(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = hub.needed(hub.listing(NAME))
    del main(online)[WEIGHTS]
    monkeypatch.setattr(Repository, "commit", lambda *_: listed.commit)
    with pytest.raises(CheckpointError, match="is missing on the hub"):
        hub.download(listed)


def test_too_little_space_is_said_before_anything_is_asked_for(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = resolve(NAME)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    online.asked.clear()
    with pytest.raises(
        CheckpointError, match=r'"someone/tiny" needs .* more on the disk .* which has 1\.0 kB'
    ) as caught:
        pull(checkpoint)
    assert "HF_HOME" in str(caught.value.tip)
    assert not [path for path in online.paths() if path.endswith("safetensors")]


def test_a_disk_that_becomes_full_is_said(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = resolve(NAME)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(CheckpointError, match="The disk became full") as caught:
        pull(checkpoint)
    assert "HF_HOME" in str(caught.value.tip)


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_says_what_to_do(status: int, online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online.repositories[NAME].gated = status
    for ask in (lambda: resolve(NAME), lambda: pull(_unseen())):
        with pytest.raises(CheckpointError, match=rf'"someone/tiny" is gated.*\({status}\)') as caught:
            ask()
        assert f"{online.endpoint}/{NAME}" in str(caught.value.tip)
        assert "hf auth login" in str(caught.value.tip)
    # The token is read from where the hub's own tools keep it.
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    folder = pulled()
    assert (folder / WEIGHTS).is_file()
    kept = [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if TOKEN.encode() in path.read_bytes()]
    told = [path for _, path, headers in online.asked if TOKEN in headers.get("Authorization", "")]
    assert told
    assert not [path for path in told if path.startswith("/cdn/")]


def test_a_repository_that_is_not_there_or_not_ours_is_named(online: Hub) -> None:
    with pytest.raises(CheckpointError, match=r'There is no "someone/other" on the hub, or it is private') as caught:
        resolve("someone/other")
    assert "hf auth login" in str(caught.value.tip)
    with pytest.raises(CheckpointError, match='"someone/tiny" has no revision "v9"'):
        resolve(f"{NAME}@v9")


def test_what_was_pulled_works_without_a_connection(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled()
    online.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint = fetch(resolve(NAME))
    verify(checkpoint, full=True)
    assert checkpoint.revision == commit(online)
    assert online.asked == []


def test_what_another_tool_downloaded_works_without_a_connection(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub.snapshot_download(NAME, allow_patterns=list(needed(online)))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint = fetch(resolve(NAME))
    assert (checkpoint.revision, checkpoint.files) == (commit(online), ())
    verify(checkpoint, full=True)
    blob = (hub.folder(NAME, commit(online)) / WEIGHTS).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        verify(checkpoint, full=True)


def test_without_a_connection_and_without_files_it_is_said(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for ask in (lambda: resolve(NAME), lambda: fetch(_unseen())):
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids"):
            ask()


def test_a_hub_out_of_reach_is_named(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled()
    checkpoint = resolve(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(CheckpointError, match=r'Cannot get "someone/tiny" from http://127\.0\.0\.1:1') as caught:
        pull(checkpoint)
    assert "check the connection" in str(caught.value.tip)
    # What is here needs no connection.
    verify(fetch(resolve(NAME)), full=True)


def test_a_name_means_the_same_files_until_it_is_pulled_again(online: Hub) -> None:
    first = pull(resolve(NAME))
    config = json.loads(main(online)["scheduler/scheduler_config.json"])
    newer = {**main(online), "scheduler/scheduler_config.json": json.dumps({**config, "shift": 9.0}).encode()}
    online.repositories[NAME].revisions = {"main": newer, "old": main(online)}
    assert fetch(resolve(NAME)).revision == first.revision
    second = pull(resolve(NAME))
    assert first.revision != second.revision == commit(online)
    assert resolve(NAME).revision == second.revision
    # The commit that made a video is still there under its own name, and is all that a manifest needs.
    assert resolve(first.anchored_name).folder != second.folder
    verify(fetch(resolve(first.anchored_name)), full=True)


def test_another_revision_is_pulled_beside_the_first(online: Hub) -> None:
    online.repositories[NAME].revisions["v1"] = {**main(online), "tokenizer/extra.txt": b"more"}
    first = pull(resolve(NAME))
    second = pull(resolve(NAME), revision="v1")
    assert first.revision != second.revision
    assert second.folder is not None
    assert (second.folder / "tokenizer" / "extra.txt").is_file()
    assert resolve(NAME).revision == first.revision
    assert resolve(f"{NAME}@v1").revision == second.revision


def test_a_truncated_and_a_flipped_file_are_found_and_pulled_again(online: Hub) -> None:
    checkpoint = pull(resolve(NAME))
    assert checkpoint.folder is not None
    blob = (checkpoint.folder / WEIGHTS).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    verify(checkpoint, full=False)
    with pytest.raises(CheckpointError, match="is damaged: its sha256 is not") as caught:
        verify(checkpoint, full=True)
    assert "vgen models pull --full someone/tiny" in str(caught.value.tip)
    verify(pull(checkpoint, full=True), full=True)
    assert online.paths("HEAD").count(WEIGHTS) == 2
    blob.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, but \d+ are expected"):
        verify(checkpoint, full=False)
    verify(fetch(checkpoint), full=True)


def test_a_pickle_is_refused_before_it_is_downloaded(online: Hub) -> None:
    del main(online)[WEIGHTS]
    checkpoint = resolve(NAME)
    with pytest.raises(CheckpointError, match="has its weights as a pickle") as caught:
        pull(checkpoint)
    assert "can run whatever" in str(caught.value)
    assert not [path for path in online.paths() if path.endswith((".safetensors", ".bin"))]


def test_a_repository_of_another_layout_is_named(online: Hub) -> None:
    del main(online)["model_index.json"]
    with pytest.raises(CheckpointError, match=r"is no checkpoint in diffusers layout: it has no model_index\.json"):
        pull(_unseen())


def test_a_lora_of_a_preset_comes_along(online: Hub) -> None:
    data = b"\7" * 3000
    online.repositories["someone/loras"] = Repository(
        {"main": {"few.safetensors": data, "many.safetensors": data * 2}}
    )
    lora = Lora(repo="someone/loras", file="few.safetensors")
    assert lora.path is None
    checkpoint = replace(pull(resolve(NAME)), loras=(lora,))
    with pytest.raises(CheckpointError, match=r'few\.safetensors of "someone/loras" was not downloaded'):
        verify(checkpoint)
    pull(checkpoint)
    verify(checkpoint, full=True)
    assert lora.path is not None
    assert lora.path.read_bytes() == data
    assert not (lora.path.parent / "many.safetensors").exists()
    with pytest.raises(CheckpointError, match=r'"someone/loras" has no file none\.safetensors'):
        pull(replace(checkpoint, loras=(replace(lora, file="none.safetensors"),)))


def test_what_is_not_of_the_hub_cannot_be_pulled(tiny_checkpoint: Path) -> None:
    for model in ("toyland", str(tiny_checkpoint)):
        with pytest.raises(UsageError, match="there is nothing to pull"):
            pull(resolve(model))


@pytest.mark.parametrize(
    ("library", "chosen"),
    [("diffusers", ["diffusion_pytorch_model-00001-of-00001.safetensors"]), ("transformers", ["model.safetensors"])],
)
def test_of_shards_and_a_single_file_one_copy_is_chosen(library: str, chosen: list[str]) -> None:
    stem = Path(chosen[0]).name.split("-")[0].removesuffix(".safetensors")
    shard, stale = f"{stem}-00001-of-00001.safetensors", f"{stem}-00001-of-00002.safetensors"
    names = ["config.json", f"{stem}.safetensors", shard, stale, f"{stem}.safetensors.index.json"]
    contents: dict[str, dict[str, Any]] = {
        "model_index.json": {"_class_name": "WanPipeline", "part": [library, "Part"], "none": [None, None]},
        f"part/{stem}.safetensors.index.json": {"weight_map": {"a": shard, "b": shard}},
    }
    paths = ["model_index.json", *(f"part/{name}" for name in names)]
    files = tuple(RemoteFile(path=path, size=1, sha256=None, blob_id="") for path in paths)
    everything = Listing(repo=NAME, revision="main", commit="0" * 40, files=files)
    found = [file.path for file in hub.select(everything, contents.__getitem__).files]
    weights = [path.removeprefix("part/") for path in found if path.endswith(".safetensors")]
    assert weights == chosen
    assert (f"part/{stem}.safetensors.index.json" in found) == (library == "diffusers")


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (28_900_000_000, "28.9 GB")]
)
def test_sizes_are_written_for_people(num_bytes: int, text: str) -> None:
    assert hub.readable(num_bytes) == text
