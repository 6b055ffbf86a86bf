"""What a run was, completely enough to run it again: kept inside the video and beside it as JSON."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vgen
from vgen import batch, integrity, loras
from vgen.checkpoints import HASHED_AT_LOAD
from vgen.conditioning import given
from vgen.errors import VgenError
from vgen.plan import Plan
from vgen.request import GenerateRequest

if TYPE_CHECKING:
    from vgen.checkpoints import Checkpoint
    from vgen.runtime import Runtime

Manifest = dict[str, Any]

LIBRARIES = ("torch", "diffusers", "transformers")

_WHAT_HAS_ONE = "give a video that vgen wrote, or the .json beside it."


def build(
    plan: Plan,
    runtime: Runtime,
    *,
    checkpoint: Mapping[str, Any],
    timings: Mapping[str, float],
    created: datetime,
    attention: Mapping[str, Any] | None = None,
) -> Manifest:
    """Return the manifest of one video; `checkpoint` is what `identity` says of the checkpoint that was loaded, and
    `attention` what sparse attention did.

    The request in it is complete: every default is written out, and the dtype is the one that was used.
    """
    return {
        "vgen": vgen.__version__,
        "created": created.isoformat(timespec="seconds"),
        "request": {**plan.to_dict(), "dtype": runtime.dtype},
        "seed": plan.seed,
        **{f"{name}_sha256": _content(paths) for name, paths in _given_files(plan).items()},
        "checkpoint": dict(checkpoint),
        "device": runtime.device,
        "dtype": runtime.dtype,
        "sampler": plan.sampler,
        **({"attention": dict(attention)} if attention is not None else {}),
        "versions": {"python": platform.python_version(), **versions()},
        "timings": {stage: round(seconds, 3) for stage, seconds in timings.items()},
    }


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what tells this checkpoint from every other: name, repository, revision, and its files' sizes and sha256.

    A hub revision says it all. The files of a folder are hashed unless they are very large; their sha256 is None then.
    LoRAs are told with what of them matches the model, where that was looked at.
    """
    known: dict[str, Any] = {
        "name": checkpoint.name,
        "family": checkpoint.family,
        "repo": checkpoint.repo,
        "revision": checkpoint.revision,
        "files": [] if checkpoint.source == "hub" else _files(checkpoint),
    }
    return {**known, "loras": [lora.to_dict() for lora in checkpoint.loras]} if checkpoint.loras else known


def sidecar(path: Path) -> Path:
    """Return where the manifest of the video at `path` lies beside it: `clip.mp4.json` for `clip.mp4`."""
    return path.parent / f"{path.name}.json"


def read(path: Path) -> Manifest:
    """Return the manifest inside a video, beside it, or in a .json file; raise `VgenError` when there is none."""
    if not path.exists():
        raise VgenError(f"There is no file {path}.", tip="check the path.")
    if path.is_file() and path.suffix.lower() == ".json":
        return _parse(path.read_bytes(), path)
    if path.is_file():
        from vgen import video

        try:
            inside = video.read_tags(path).get(video.MANIFEST_TAG)
        except VgenError as error:
            raise VgenError(error.message, tip=_WHAT_HAS_ONE) from error
        if inside is not None:
            return _parse(inside, path)
    if sidecar(path).is_file():
        return _parse(sidecar(path).read_bytes(), sidecar(path))
    raise VgenError(
        f"{path} holds no manifest and there is none beside it ({sidecar(path).name}).",
        tip="only videos that vgen wrote, and were not converted since, know how they were made.",
    )


def request(manifest: Manifest, changes: Mapping[str, Any]) -> GenerateRequest:
    """Return the request that makes the manifest's video again, but for the fields in `changes`.

    Raises `VgenError` when a file that it was made from is not the same any more.
    """
    asked = GenerateRequest.from_dict(batch.merge(manifest["request"], changes))
    for name, paths in _given_files(asked).items():
        if not paths or name in changes or not all(path.exists() for path in paths):
            continue
        if _content(paths) != manifest.get(f"{name}_sha256"):
            option = "--" + name.replace("_", "-")
            kind = {"lora": "LoRA", "interpolate": "image"}.get(name, name.replace("_", " "))
            named = f"The {kind} {paths[0]} has" if len(paths) == 1 else f"An {kind} of {option} has"
            raise VgenError(f"{named} changed since the video was made.", tip=f"give one with {option}.")
    return asked


def differences(manifest: Manifest, checkpoint: Checkpoint) -> list[str]:
    """Return what keeps this checkpoint and these libraries from making the manifest's frames again, in sentences."""
    found = []
    was, now = manifest["checkpoint"], identity(checkpoint)
    if any(was.get(key) != value for key, value in now.items() if key not in ("name", "loras")):
        found.append(
            f'The weights of "{checkpoint.name}" are not those that made the video, so the frames will differ.'
        )
    hashes = [lora.get("sha256") for lora in was.get("loras", [])]
    found += [
        f"The LoRA {lora.name} is not what was on the model that made the video, so the frames will differ."
        for lora in map(loras.identify, checkpoint.loras)
        if lora.sha256 is not None and lora.sha256 not in hashes
    ]
    for library, version in versions().items():
        was = manifest["versions"].get(library)
        if was != version:
            found.append(f"The video was made with {library} {was} and this is {version}, so the frames may differ.")
    return found


def _given_files(asked: GenerateRequest | Plan) -> dict[str, list[Path]]:
    """Return the files that a request names, by the option that does."""
    single = {"image": asked.image, "last_image": asked.last_image, "video": asked.video, "mask": asked.mask}
    files = {name: [path] if path else [] for name, path in single.items()}
    keyframes = [given.keyframe(text)[0] for text in asked.interpolate or ()]
    return {**files, "interpolate": keyframes, "lora": loras.local_files(asked.lora)}


def _content(paths: Sequence[Path]) -> str | None:
    """Return the sha256 of a file; of several, or of a folder of PNGs, that of their sha256; None of none."""
    files = [file for path in paths for file in (sorted(path.glob("*.png")) if path.is_dir() else [path])]
    digests = [integrity.sha256(file) for file in files]
    if len(digests) <= 1:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _files(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    if checkpoint.files:
        return [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in checkpoint.files]
    assert checkpoint.folder is not None  # Only what is on the hub may lack one.
    paths = sorted(path for path in checkpoint.folder.rglob("*") if path.is_file())
    hashed = sum(path.stat().st_size for path in paths) <= HASHED_AT_LOAD
    return [
        {
            "path": path.relative_to(checkpoint.folder).as_posix(),
            "size": path.stat().st_size,
            "sha256": integrity.sha256(path) if hashed else None,
        }
        for path in paths
    ]


def versions() -> dict[str, str]:
    """Return the versions of the libraries that the frames depend on."""
    return {name: metadata.version(name) for name in LIBRARIES}


def _parse(text: str | bytes, path: Path) -> Manifest:
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise VgenError(f"The manifest in {path} is damaged: {error}.", tip=_WHAT_HAS_ONE) from error
    parts = ("request", "checkpoint", "versions")
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(part), dict) for part in parts):
        raise VgenError(f"{path} is no manifest of vgen.", tip=_WHAT_HAS_ONE)
    return manifest
