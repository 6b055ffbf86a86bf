"""What a run leaves of an edit: latents and masks in a file, of which `vgen decode` makes the video."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import files

if TYPE_CHECKING:
    from torch import Tensor

KIND = "edit"  # of the file


def is_edit(path: Path) -> bool:
    """Return whether a file holds the latents of an edit."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("vgen") == KIND
    except (OSError, SafetensorError):
        return False


def read(path: Path) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return what a run has left of an edit: its facts, latents [N, C, T, h, w] and masks [N, 1, T, h, w]."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        return facts, file.get_tensor("latents"), file.get_tensor("masks")


def save(path: Path, facts: dict[str, Any], latents: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Write what is finished of an edit: of each of its parts latents [1, C, T, h, w] and a mask [1, 1, T, h, w]."""
    import torch

    tensors = {"latents": torch.cat(list(latents)).float().contiguous(), "masks": torch.cat(list(masks)).contiguous()}
    files.write_tensors(path, tensors, {"vgen": KIND, "facts": json.dumps(facts)})
