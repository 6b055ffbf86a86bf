"""Whether files are what they should be: sizes, hashes, and no format but safetensors for weights."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgen.errors import CheckpointError, UsageError

# Formats that Python unpickles: reading such a file can run whatever code its author put there.
PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """One file of a checkpoint: `path` inside its folder with forward slashes, `size` in bytes, `sha256` in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file: its shape and its bytes."""

    shape: tuple[int, ...]
    num_bytes: int


def sha256(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clip_sha256(path: Path) -> str:
    """Return the sha256 of a clip: of a file, or of the names and sha256 of a folder's files. Raises `UsageError`."""
    if not path.is_dir():
        if not path.is_file():
            raise UsageError(f"There is no video {path}.", tip="check the path.")
        return sha256(path)
    files = sorted(file for file in path.iterdir() if file.is_file())
    return hashlib.sha256("".join(f"{file.name}{sha256(file)}" for file in files).encode()).hexdigest()


def git_blob_id(path: Path) -> str:
    """Return what git and the hub name a small file by, in hex: the sha1 of its size and content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def describe_files(folder: Path) -> tuple[CheckpointFile, ...]:
    """Return every file under `folder` but model cards with its size and sha256, sorted by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    return tuple(
        CheckpointFile(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=sha256(path))
        for path in paths
    )


def check_file(path: Path, file: CheckpointFile, *, full: bool, tip: str) -> None:
    """Raise `CheckpointError` unless `path` has the size of `file` and, with `full`, its sha256."""
    size = path.stat().st_size
    if size != file.size:
        raise CheckpointError(f"{path} has {size} bytes, but {file.size} are expected.", tip=tip)
    if full and sha256(path) != file.sha256:
        raise CheckpointError(f"{path} is damaged: its sha256 is not {file.sha256}.", tip=tip)


def check_safetensors(path: Path, *, tip: str) -> dict[str, Any]:
    """Return the header of a file: dtype, shape and place by tensor; raise `CheckpointError` unless it is as long.

    It is 8 bytes of header length, a JSON header, and the data.
    """
    size = path.stat().st_size
    header_length, header = _header(path, tip)
    try:
        expected = 8 + header_length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (LookupError, TypeError) as error:
        raise _no_safetensors(path, tip) from error
    if size != expected:
        raise CheckpointError(f"{path} has {size} bytes, but {expected} are expected.", tip=tip)
    return header


def num_parameters(path: Path) -> int:
    """Return how many numbers a safetensors file holds, by its header; raise `CheckpointError` when it is none."""
    try:
        return sum(math.prod(entry["shape"]) for entry in _header(path, "")[1].values())
    except (KeyError, TypeError) as error:
        raise _no_safetensors(path, "") from error


def tensors(path: Path, *, tip: str) -> dict[str, StoredTensor]:
    """Return what a whole safetensors file holds, as its header says; raise `CheckpointError` where it is none."""
    header = check_safetensors(path, tip=tip)
    return {
        name: StoredTensor(shape=tuple(entry["shape"]), num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def pickle_refused(where: str, pickle: str, *, tip: str | None = None) -> CheckpointError:
    """Return the error for weights that are there as a pickle only: which file, why not, and what to do."""
    return CheckpointError(
        f"{where} has its weights as a pickle ({pickle}) and not as safetensors. Loading a pickle can run whatever "
        "code its author put there, so vgen does not.",
        tip=tip
        or "convert it where you trust it: load it with diffusers and call "
        "save_pretrained(FOLDER, safe_serialization=True); or ask its authors for safetensors.",
    )


def _header(path: Path, tip: str) -> tuple[int, dict[str, Any]]:
    """Return the length of a safetensors file's header, and what it says of each tensor."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        return length, {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (struct.error, ValueError, AttributeError) as error:
        raise _no_safetensors(path, tip) from error


def _no_safetensors(path: Path, tip: str) -> CheckpointError:
    return CheckpointError(f"{path} is no safetensors file.", tip=tip)
