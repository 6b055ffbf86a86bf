"""diffusers' layout of a folder: model_index.json, and for each component named there a folder of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vgen import integrity
from vgen.checkpoints.checkpoint import Component
from vgen.errors import CheckpointError, first_line

COPY_AGAIN = "copy or download the folder again."


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds. Raises `CheckpointError` where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is no checkpoint in diffusers layout: it has no {path.name}.",
            tip="give the folder that holds model_index.json and one folder per component.",
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {first_line(error)}.", tip=COPY_AGAIN) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"Cannot read {path}: a JSON object is expected.", tip=COPY_AGAIN)
    return content


def components(folder: Path | None) -> tuple[Component, ...]:
    """Return the components whose weights are in a folder, counted in the headers of their files; none if unreadable.

    What is missing or damaged is told by `verify`, before anything is loaded.
    """
    if folder is None:
        return ()
    try:
        found = {name: weight_files(folder / name) for name in read_json(folder / "model_index.json")}
        counted = {name: sum(map(integrity.num_parameters, files)) for name, files in found.items() if files}
    except (OSError, CheckpointError):
        return ()
    return tuple(Component(name=name, parameters=number) for name, number in counted.items())


def weight_files(component: Path) -> list[Path]:
    """Return the files that a component is loaded from: its shards, or the one that is no other variant."""
    for shards in sorted(component.glob("*.safetensors.index.json")):
        return [component / shard for shard in sorted(set(read_json(shards)["weight_map"].values()))]
    return [path for path in sorted(component.glob("*.safetensors")) if path.name.count(".") == 1]
