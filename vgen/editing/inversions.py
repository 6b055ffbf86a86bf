"""The files of `vgen invert`: the noise that a clip comes from, its V, and the request that they were made by."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import files
from vgen.checkpoints import resolve
from vgen.editing.request import EditRequest
from vgen.errors import UsageError, VgenError
from vgen.integrity import clip_sha256

if TYPE_CHECKING:
    from torch import Tensor

KIND = "inversion"  # of the file
# What an inversion decides for every edit that begins from it.
FIXED = (
    "source", "model", "lora", "method", "num_inference_steps", "strength", "attention", "fit", "width",
    "height", "num_frames", "overlap", "fps", "start", "seconds",
)  # fmt: skip


def facts_of(path: Path) -> dict[str, Any]:
    """Return what a file of `vgen invert` says about itself. Raises `VgenError` for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise VgenError(f"Cannot read the inversion {path}: {reason}.", tip="make one with vgen invert.") from error
    if metadata.get("vgen") != KIND:
        raise VgenError(f"{path} is no inversion.", tip="make one with vgen invert.")
    facts: dict[str, Any] = json.loads(metadata["facts"])
    return facts


def begin(request: EditRequest) -> EditRequest:
    """Return a request with what the inversion that it begins from has decided."""
    assert request.noise is not None
    facts = facts_of(request.noise)
    made = EditRequest.from_dict(facts["request"])
    for name in FIXED:
        asked, was = getattr(request, name), getattr(made, name)
        if name == "model" and asked is not None:
            asked = resolve(asked).lasting_name
        if asked is not None and asked != was:
            raise UsageError(
                f"{request.noise} was made with {name.replace('_', ' ')} {was}, and {asked} is given.",
                tip="leave it out, or invert the clip again.",
            )
    # Which clip it is tells its content, not its name.
    if clip_sha256(request.video) != facts["video_sha256"]:
        raise UsageError(f"{request.noise} is the noise of another clip than {request.video}.", tip="invert this one.")
    most = made.inject or 0
    if (request.inject or 0) > most:
        raise UsageError(
            f"{request.noise} holds V of {most} steps, and --inject is {request.inject}.",
            tip=f"use --inject {most} or less, or invert with --inject {request.inject}.",
        )
    fixed = {name: getattr(made, name) for name in FIXED}
    return replace(request, **fixed, inject=most if request.inject is None else request.inject)


def noise_of(path: Path, number: int) -> Tensor:
    """Return the noise [1, C, T, h, w] of a window by its number."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        noise: Tensor = file.get_slice("noise")[number : number + 1]
    return noise


def features_of(path: Path, number: int) -> Iterator[tuple[str, Tensor]]:
    """Return the features that `--inject` carries over, by their names, of a window by its number."""
    from safetensors import safe_open

    prefix = f"features.{number}."
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            if name.startswith(prefix):
                yield name.removeprefix(prefix), file.get_tensor(name)


def save(
    path: Path, facts: Mapping[str, Any], noises: Sequence[Tensor], features: Sequence[Mapping[str, Tensor]]
) -> None:
    """Write of each window its noise [1, C, T, h, w] and its features by their names, all of it or nothing."""
    import torch

    tensors = {"noise": torch.cat(list(noises))}
    for number, stored in enumerate(features):
        tensors |= {f"features.{number}.{name}": value.contiguous() for name, value in stored.items()}
    files.write_tensors(path, tensors, {"vgen": KIND, "facts": json.dumps(facts)})
