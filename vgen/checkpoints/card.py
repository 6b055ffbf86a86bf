"""The card, vgen.json: what vgen writes into a checkpoint of its own, so that it is known for what it is."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import vgen
from vgen.checkpoints.checkpoint import Capabilities, Checkpoint, Rules, Source, defaults
from vgen.checkpoints.layout import components, read_json, weight_files
from vgen.errors import CheckpointError
from vgen.integrity import CheckpointFile, describe_files

# What vgen writes into a folder of its own, and the newest version of it that this one reads.
CARD, CARD_FORMAT = "vgen.json", 1


def write_card(folder: Path, checkpoint: Checkpoint, **more: Any) -> None:
    """Write into `folder` what `resolve` is to say of it: what it says of `checkpoint`, of the files that are there.

    Without a card, a folder is taken for any other of its pipeline: with that family's sizes and defaults.
    `more` is for people.
    """
    card = {
        "format": CARD_FORMAT,
        "vgen": vgen.__version__,
        "family": checkpoint.family,
        "quantization": checkpoint.quantization,
        "licence": checkpoint.licence,
        "permits": checkpoint.permits,
        "knows": checkpoint.knows,
        "defaults": asdict(checkpoint.defaults),
        "rules": asdict(checkpoint.rules),
        "can": asdict(checkpoint.can),
        "sizes": checkpoint.sizes,
        **more,
    }
    (folder / CARD).unlink(missing_ok=True)
    card["files"] = [asdict(file) for file in describe_files(folder)]
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def from_card(name: str, folder: Path, *, source: Source, repo: str | None, revision: str | None) -> Checkpoint:
    """Return the checkpoint that a folder's card describes. Raises `CheckpointError` for a newer or a damaged card."""
    card = read_json(folder / CARD)
    written = card.get("format")
    if isinstance(written, int) and written > CARD_FORMAT:
        raise CheckpointError(
            f'"{name}" was written by a newer vgen ({card.get("vgen")}): its format is {written}, and this one reads '
            f"up to {CARD_FORMAT}.",
            tip="update vgen.",
        )
    try:
        return Checkpoint(
            name=name,
            family=card["family"],
            source=source,
            folder=folder,
            repo=repo,
            revision=revision,
            licence=card["licence"],
            permits=card["permits"],
            files=tuple(CheckpointFile(**file) for file in card["files"]),
            defaults=defaults(card["defaults"]),
            knows=card["knows"],
            rules=Rules(**card["rules"]),
            can=Capabilities(**card["can"]),
            sizes=tuple((width, height) for width, height in card["sizes"]),
            quantization=card["quantization"],
            # Two bytes count as a parameter, as of other weights: those of integers are fewer than their number tells.
            components=tuple(
                replace(part, parameters=sum(path.stat().st_size for path in weight_files(folder / part.name)) // 2)
                if part.name in ("transformer", "transformer_2")
                else part
                for part in components(folder)
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CARD} is damaged: {error!r}.", tip="copy or write the folder again."
        ) from error
