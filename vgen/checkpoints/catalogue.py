"""The catalogue, checkpoints.yaml: the checkpoints that have a name, and the families with what is common to each."""

from __future__ import annotations

import functools
import importlib.resources
from pathlib import Path
from typing import Any

from vgen import hub
from vgen.checkpoints.checkpoint import Capabilities, Checkpoint, Component, Peak, Rules, defaults
from vgen.checkpoints.layout import components
from vgen.errors import CheckpointError, UsageError, first_line
from vgen.integrity import CheckpointFile
from vgen.loras import Lora

_TIP = (
    "in a checkout vgen/checkpoints.yaml is a link to ../checkpoints.yaml; where links were lost, copy that file "
    "there."
)


@functools.cache
def read() -> dict[str, Any]:
    """Return what checkpoints.yaml says. Raises `CheckpointError` where it cannot be read or is another file."""
    import yaml

    resource = importlib.resources.files("vgen") / "checkpoints.yaml"
    try:
        text = resource.read_text(encoding="utf-8")
        catalogue = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"Cannot read {resource}: {first_line(error)}", tip=_TIP) from error
    if not isinstance(catalogue, dict) or not {"families", "checkpoints"} <= catalogue.keys():
        said = text[:60].strip()
        raise CheckpointError(f'{resource} is no list of checkpoints: it says "{said}".', tip=_TIP)
    return catalogue


def names() -> list[str]:
    """Return the names of `checkpoints.yaml`, in its order."""
    return list(read()["checkpoints"])


def named(name: str, revision: str | None) -> Checkpoint:
    """Return the checkpoint of a name, of a revision or the one that the catalogue says; asks nothing of the hub."""
    entry = _entry(name)
    family = read()["families"][entry["family"]]
    repo = entry.get("repo")
    follows = revision = revision or entry.get("revision")
    files = tuple(CheckpointFile(**file) for file in entry.get("files", []))
    folder: Path | None
    if repo is None:
        if revision:
            raise UsageError(f'"{name}" comes with vgen and has no revision "{revision}".', tip=f"use {name} alone.")
        folder = Path(str(importlib.resources.files("vgen"))) / entry["path"]
    else:
        folder, revision, files = _cached(repo, revision)
    return Checkpoint(
        name=name,
        family=entry["family"],
        source="hub" if repo else "embedded",
        folder=folder,
        repo=repo,
        revision=revision,
        licence=entry["licence"],
        permits=read()["licences"][entry["licence"]],
        files=files,
        defaults=defaults({**family["defaults"], **entry.get("defaults", {})}),
        knows=entry.get("knows", ""),
        rules=Rules(**{**family["rules"], **entry.get("rules", {})}),
        can=capabilities([*family["can"], *entry["can"]]),
        download_gb=entry.get("download_gb"),
        sizes=tuple((width, height) for width, height in entry["sizes"]),
        components=tuple(Component(name=part, parameters=n) for part, n in entry.get("parameters", {}).items())
        or components(folder if repo else None),
        peak=Peak(**entry.get("peak_gb", {})),
        loras=tuple(Lora(**lora) for lora in entry.get("loras", [])),
        follows=follows,
    )


def listed_as(repo: str) -> str | None:
    """Return the name that the catalogue has for a hub repository."""
    entries = read()["checkpoints"].items()
    return next((name for name, entry in entries if entry.get("repo") == repo), None)


def capabilities(words: list[str]) -> Capabilities:
    """Return what the words of the catalogue say that a checkpoint can do."""
    return Capabilities(**{word.replace("-", "_"): True for word in words})


def _entry(name: str) -> dict[str, Any]:
    """Return a catalogue's entry; of a preset, its base with what differs put in place."""
    entry: dict[str, Any] = read()["checkpoints"][name]
    if "base" not in entry:
        return entry
    base = _entry(entry["base"])
    defaults = {**base.get("defaults", {}), **entry.get("defaults", {})}
    return {**base, **entry, "defaults": defaults}


def _cached(repo: str, revision: str | None) -> tuple[Path | None, str | None, tuple[CheckpointFile, ...]]:
    """Return folder, commit and files of what was pulled; of what another tool has downloaded, the first two."""
    if (locked := hub.lock(repo, revision)) is not None:
        return hub.folder(repo, locked.commit), locked.commit, locked.files
    if (commit := hub.cached_commit(repo, revision)) is not None:
        return hub.folder(repo, commit), commit, ()
    return None, revision, ()
