"""What a run leaves of a video: its latents in a file, of which `vgen decode` makes the frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from vgen import files, outputs
from vgen.errors import VgenError
from vgen.request import GenerateRequest

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.plan import Plan

KIND = "latents"  # of the file


def save(path: Path, latents: Tensor, plan: Plan) -> None:
    """Write latents [N, C, T, h, w] and the plan that made them as safetensors, all of it or nothing.

    Raises `VgenError` where the disk is full or the folder cannot be written to.
    """
    metadata = {"vgen": KIND, "request": json.dumps(plan.to_dict())}
    files.write_tensors(path, {"latents": latents.detach().float().contiguous().cpu()}, metadata)


def load(path: Path) -> tuple[Tensor, GenerateRequest]:
    """Return latents float32 [N, C, T, h, w] and the request, every field given, out of a file of `save`.

    Raises `VgenError` for a file that is missing, damaged or not of this kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("vgen") != KIND:
                raise VgenError(
                    f"{path} holds no latents of vgen.", tip="give a file that --keep-latents or a failed run left."
                )
            return file.get_tensor("latents"), GenerateRequest.from_dict(json.loads(metadata["request"]))
    except FileNotFoundError as error:
        raise VgenError(f"There is no file {path}.", tip="check the path.") from error
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise VgenError(
            f"Cannot read the latents in {path}: {error}",
            tip=f"give a file that ends in {outputs.LATENTS}; if it does, it is damaged: run again.",
        ) from error
