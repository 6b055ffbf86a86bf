"""Whether a checkpoint is whole: every file there, as long as it should be, and as it was published."""

from __future__ import annotations

import re
from pathlib import Path

from vgen import integrity, loras
from vgen.checkpoints.checkpoint import Checkpoint
from vgen.checkpoints.layout import COPY_AGAIN, read_json
from vgen.errors import CheckpointError
from vgen.integrity import PICKLES, CheckpointFile

# Hashing reads about 1 GB in a second: below this it is done before every load, above it when it is asked for.
HASHED_AT_LOAD = 2 * 2**30


def verify(checkpoint: Checkpoint, *, full: bool | None = None) -> None:
    """Raise `CheckpointError` unless every file is there, of the right size and (with `full`) of the right sha256.

    Files of the catalogue and those that were pulled are compared in size and hash. Another folder has no list: there,
    each component must have its configuration and weights in safetensors, each file of which must be as long as its
    header says, and files that the hub's cache names by their sha256 are hashed when `full`. By default, small
    checkpoints are hashed and large ones are not.
    """
    folder = checkpoint.folder
    if folder is None or not folder.is_dir():
        where = f"there is no folder {folder}." if folder else "it was not downloaded."
        raise CheckpointError(f'The checkpoint "{checkpoint.name}" is missing: {where}', tip=_repair(checkpoint))
    if full is None:
        sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
        full = (sum(file.size for file in checkpoint.files) or sum(sizes)) <= HASHED_AT_LOAD
    for file in checkpoint.files:
        _verify_file(checkpoint, folder, file, full=full)
    if not checkpoint.files:
        _verify_components(checkpoint, folder, full=full)
    for lora in checkpoint.loras:
        tip = "copy or download it again." if lora.text else _repair(checkpoint)
        loras.verify(lora, full=full, of=checkpoint.name, tip=tip)


def is_whole(checkpoint: Checkpoint) -> bool:
    """Return whether all files of a checkpoint are on this machine in their full size."""
    try:
        verify(checkpoint, full=False)
    except CheckpointError:
        return False
    return True


def _verify_file(checkpoint: Checkpoint, folder: Path, file: CheckpointFile, *, full: bool) -> None:
    path = folder / file.path
    if not path.is_file():
        raise CheckpointError(
            f'The checkpoint "{checkpoint.name}" is incomplete: {path} is missing.', tip=_repair(checkpoint)
        )
    integrity.check_file(path, file, full=full, tip=_repair(checkpoint))


def _verify_components(checkpoint: Checkpoint, folder: Path, *, full: bool) -> None:
    for path in _component_files(checkpoint, folder):
        if path.suffix == ".safetensors":
            integrity.check_safetensors(path, tip=_repair(checkpoint))
        blob = path.resolve().name
        if full and path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) and integrity.sha256(path) != blob:
            raise CheckpointError(f"{path} is damaged: its sha256 is not {blob}.", tip=_repair(checkpoint))


def _component_files(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """Return the files that the components named in model_index.json are made of; raise where one is missing."""
    found = [folder / "model_index.json"]
    index = read_json(folder / "model_index.json")
    for component in (name for name, entry in index.items() if isinstance(entry, list) and entry[0]):
        directory = folder / component
        files = sorted(path for path in directory.glob("*") if path.is_file())
        if not files:
            raise CheckpointError(f"{directory} is missing or empty.", tip=_repair(checkpoint))
        for shards in directory.glob("*.safetensors.index.json"):
            for shard in sorted(set(read_json(shards)["weight_map"].values())):
                if not (directory / shard).is_file():
                    raise CheckpointError(f"{directory / shard} is missing.", tip=_repair(checkpoint))
        if (directory / "config.json").is_file() and not any(path.suffix == ".safetensors" for path in files):
            if pickles := [path.name for path in files if path.suffix in PICKLES]:
                raise integrity.pickle_refused(str(directory), pickles[0])
            raise CheckpointError(f"{directory} has no weights.", tip=_repair(checkpoint))
        found += files
    return found


def _repair(checkpoint: Checkpoint) -> str:
    if checkpoint.source == "embedded":
        return "install vgen again: its own checkpoint comes with the package."
    if checkpoint.source == "hub":
        return f"get what is missing or damaged anew: vgen models pull --full {checkpoint.name}"
    return COPY_AGAIN
