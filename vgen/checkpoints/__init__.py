"""Checkpoints by name, folder or hub id: where they are, what they take and can do, and whether they are whole."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from vgen import hub, loras
from vgen.checkpoints import catalogue
from vgen.checkpoints.card import CARD, CARD_FORMAT, from_card, write_card
from vgen.checkpoints.catalogue import names
from vgen.checkpoints.checkpoint import Capabilities, Checkpoint, Component, Defaults, Peak, Rules, Source
from vgen.checkpoints.configuration import from_configuration
from vgen.checkpoints.verification import HASHED_AT_LOAD, is_whole, verify
from vgen.errors import UsageError, did_you_mean

__all__ = [
    "CARD",
    "CARD_FORMAT",
    "HASHED_AT_LOAD",
    "Capabilities",
    "Checkpoint",
    "Component",
    "Defaults",
    "Peak",
    "Rules",
    "Source",
    "fetch",
    "is_whole",
    "names",
    "pull",
    "remote",
    "resolve",
    "verify",
    "write_card",
]

# What the hub is asked for before anything heavy: enough to know the family, the sizes and the defaults.
_CARD_PATTERNS = ("model_index.json", "vgen.json", "*/config.json", "*/*_config.json")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def resolve(model: str) -> Checkpoint:
    """Return the checkpoint of a name in `checkpoints.yaml`, a folder, or a hub id, the latter two `[@revision]`.

    For a name nothing is asked, whether it is downloaded or not. Of another hub id only the small configuration files
    are fetched, and nothing when they are in the local cache. Raises `UsageError` for a name that is none of the
    three, and `CheckpointError` for a folder that is no checkpoint or one of a family that vgen does not know.
    """
    name, _, revision = model.partition("@")
    if name in names():
        return catalogue.named(name, revision or None)
    path = _existing(model)
    if path is not None and path.is_dir():
        return _described(model, path, source="folder", repo=None, revision=None)
    if path is not None:
        raise UsageError(
            f'"{model}" is a file, but a checkpoint is a folder in diffusers layout.',
            tip="give the folder that holds model_index.json.",
        )
    if _HUB_ID.fullmatch(name):
        if (listed := catalogue.listed_as(name)) is not None:
            return catalogue.named(listed, revision or None)
        return _of_hub(model, name, revision or None)
    raise UsageError(
        f'There is no model "{model}".{did_you_mean(name, names())}',
        tip="use a name of `vgen models list`, a folder in diffusers layout, or a hub id such as owner/name.",
    )


def fetch(checkpoint: Checkpoint, progress: hub.Progress = hub.SILENT) -> Checkpoint:
    """Return the checkpoint with its files on this machine, downloading what is missing and nothing else.

    Raises `CheckpointError` when there is too little space or the hub cannot be reached.
    """
    # LoRAs first: they are small, and a wrong one is found before the rest is downloaded.
    fetched = tuple(loras.fetch(lora, progress) for lora in checkpoint.loras)
    own = replace(checkpoint, loras=())
    if own.repo is not None and not is_whole(own):
        own = _download(own, progress, of=own.revision, revision=own.follows, full=False)
    return replace(own, loras=fetched)


def pull(
    checkpoint: Checkpoint,
    progress: hub.Progress = hub.SILENT,
    *,
    revision: str | None = None,
    full: bool = False,
) -> Checkpoint:
    """Return the checkpoint as the hub has it today, with what is not here downloaded and checked.

    `revision` is another one than the checkpoint follows. With `full`, what is here is hashed, and what is damaged
    comes anew. Raises `UsageError` for a checkpoint that is not of the hub, and `CheckpointError` as `fetch` does.
    """
    if checkpoint.repo is None:
        raise UsageError(
            f'"{checkpoint.name}" is {"a part of vgen" if checkpoint.source == "embedded" else "a local folder"}: '
            "there is nothing to pull.",
            tip="give a name of `vgen models list` or a hub id.",
        )
    revision = revision or checkpoint.follows
    return _download(checkpoint, progress, of=revision, revision=revision, full=full)


def remote(checkpoint: Checkpoint, *, of: str | None = None) -> tuple[hub.Listing, ...]:
    """Return what the hub has that the checkpoint is loaded from: its own files, then those of its LoRAs.

    `of` is the revision or commit, by default the one that the checkpoint follows.
    """
    assert checkpoint.repo is not None, "checkpoints of the hub have a repository"
    own = hub.needed(hub.listing(checkpoint.repo, of or checkpoint.follows))
    of_hub = [(lora.repo, lora) for lora in checkpoint.loras if lora.repo is not None]
    return (own, *(hub.only(hub.listing(repo, lora.revision), lora.file) for repo, lora in of_hub))


def _existing(model: str) -> Path | None:
    """Return the absolute path that a text names, or None where nothing can be there, as no file name is like it."""
    try:
        path = Path(model).expanduser()
        return path.resolve() if path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _download(
    checkpoint: Checkpoint, progress: hub.Progress, *, of: str | None, revision: str | None, full: bool
) -> Checkpoint:
    """Download the files of a revision or commit, `of`, lock them as what `revision` means, and return them."""
    assert checkpoint.repo is not None
    own, *others = remote(checkpoint, of=of)
    for part in (replace(own, revision=revision or hub.DEFAULT_REVISION), *others):
        hub.download(part, progress, full=full)
    if checkpoint.name in names():
        return replace(catalogue.named(checkpoint.name, revision), loras=checkpoint.loras)
    return replace(_of_hub(checkpoint.name, checkpoint.repo, revision), loras=checkpoint.loras)


def _of_hub(name: str, repo: str, revision: str | None) -> Checkpoint:
    """Return the checkpoint of a hub id that the catalogue does not have, as its own small files describe it."""
    locked = hub.lock(repo, revision)
    folder = hub.folder(repo, locked.commit) if locked else hub.card(repo, revision, _CARD_PATTERNS)
    found = _described(name, folder, source="hub", repo=repo, revision=folder.name)
    return replace(found, files=locked.files if locked else (), follows=revision)


def _described(name: str, folder: Path, *, source: Source, repo: str | None, revision: str | None) -> Checkpoint:
    """Build a checkpoint from what its own configuration files say, or from the card of one that vgen has written."""
    described = from_card if (folder / CARD).is_file() else from_configuration
    return described(name, folder, source=source, repo=repo, revision=revision)
