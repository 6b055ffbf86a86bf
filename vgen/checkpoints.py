"""Checkpoints by name, folder or hub id: where they are, what they take, and whether their files are whole."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from vgen.errors import CheckpointError, UsageError, VgenError, did_you_mean

Source = Literal["embedded", "folder", "hub"]

# What the hub is asked for before anything heavy: enough to know the family, the sizes and the defaults.
_CARD_PATTERNS = ("model_index.json", "*/config.json", "*/*_config.json")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """One file of a checkpoint: `path` inside its folder with forward slashes, `size` in bytes, `sha256` in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a checkpoint takes when the user says nothing; sizes in pixels, `fps` in frames per second."""

    width: int
    height: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    negative_prompt: str
    max_sequence_length: int


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which requests a checkpoint can take at all.

    Sizes are multiples of `size_multiple` up to `max_size` pixels; frame counts are `frame_multiple` * k + 1 up to
    `max_frames`; `known_frames` says whether frames can be given (a first image), which needs per-token timesteps.
    `needs_image` is true of a model that only continues an image, `last_image` of one that can also end with one.
    `two_transformers` share the noise levels and may have a guidance scale each; with `embedded_guidance` the guidance
    scale is an input of the model. `only_size` (width, height) is the one size that a model takes whose positions are
    learned.
    """

    size_multiple: int
    frame_multiple: int
    max_size: int
    max_frames: int
    known_frames: bool
    needs_image: bool = False
    last_image: bool = False
    two_transformers: bool = False
    embedded_guidance: bool = False
    only_size: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found: its family, its folder in diffusers layout (None: not downloaded), and its rules.

    `knows` is one sentence on what a small model can show; it is empty for a model without such a limit.
    """

    name: str
    family: str
    source: Source
    folder: Path | None
    repo: str | None
    revision: str | None
    licence: str
    files: tuple[CheckpointFile, ...]
    defaults: Defaults
    knows: str
    rules: Rules


def names() -> list[str]:
    """Return the names of `checkpoints.yaml`, in its order."""
    return list(_catalogue()["checkpoints"])


def resolve(model: str) -> Checkpoint:
    """Return the checkpoint of a name in `checkpoints.yaml`, a folder, or a hub id (`owner/name[@revision]`).

    Of a hub id only the small configuration files are fetched, and nothing when they are in the local cache. Raises
    `UsageError` for a name that is none of the three, and `CheckpointError` for a folder that is no checkpoint or
    one of a family that vgen cannot run.
    """
    if model in names():
        return _named(model)
    path = _existing(model)
    if path is not None and path.is_dir():
        return _described(model, path, source="folder", repo=None, revision=None)
    if path is not None:
        raise UsageError(
            f'"{model}" is a file, but a checkpoint is a folder in diffusers layout.',
            tip="give the folder that holds model_index.json.",
        )
    repo, _, revision = model.partition("@")
    if _HUB_ID.fullmatch(repo) and not did_you_mean(model, names()):
        snapshot = _snapshot(repo, revision or None, _CARD_PATTERNS)
        return _described(model, snapshot, source="hub", repo=repo, revision=snapshot.name)
    raise UsageError(
        f'There is no model "{model}".{did_you_mean(model, names())}',
        tip=f"use a name ({', '.join(names())}), a folder in diffusers layout, or a hub id such as owner/name.",
    )


def fetch(checkpoint: Checkpoint) -> None:
    """Download what a checkpoint of the hub lacks on this machine; nothing for one that is whole, or not of the hub.

    Raises `CheckpointError` when the hub cannot be reached.
    """
    if checkpoint.repo is None or checkpoint.folder is None:
        return
    try:
        verify(checkpoint, full=False)
    except CheckpointError:
        components = _components(checkpoint.folder)
        patterns = ("model_index.json", *(f"{component}/*" for component in components))
        _snapshot(checkpoint.repo, checkpoint.revision, patterns, cached=False)


def verify(checkpoint: Checkpoint, *, full: bool = True) -> None:
    """Raise `CheckpointError` unless every file is there, of the right size and (with `full`) of the right sha256.

    Files listed in the catalogue are compared in size and hash. A folder or hub snapshot has no list: there, each
    component must have its configuration and weights, each safetensors file must be as long as its header says, and
    files that the hub's cache names by their sha256 are hashed when `full`.
    """
    folder = checkpoint.folder
    if folder is None or not folder.is_dir():
        raise CheckpointError(
            f'The checkpoint "{checkpoint.name}" is missing: there is no folder {folder}.', tip=_repair(checkpoint)
        )
    if checkpoint.files:
        for file in checkpoint.files:
            _verify_file(checkpoint, folder, file, full=full)
        return
    for path in _component_files(checkpoint, folder):
        if path.suffix == ".safetensors":
            _verify_safetensors(checkpoint, path)
        blob = path.resolve().name
        if full and path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) and sha256(path) != blob:
            raise CheckpointError(f"{path} is damaged: its sha256 is not {blob}.", tip=_repair(checkpoint))


def sha256(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path) -> tuple[CheckpointFile, ...]:
    """Return every file under `folder` but model cards with its size and sha256, sorted by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    return tuple(
        CheckpointFile(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=sha256(path))
        for path in paths
    )


def _existing(model: str) -> Path | None:
    """Return the absolute path that a text names, or None where nothing can be there, as no file name is like it."""
    try:
        path = Path(model).expanduser()
        return path.resolve() if path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _snapshot(repo: str, revision: str | None, patterns: tuple[str, ...], *, cached: bool = True) -> Path:
    """Return the local folder of a hub repository with the files of `patterns`; if `cached`, what is there will do."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if cached:
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            if (folder / "transformer" / "config.json").is_file() and (folder / "model_index.json").is_file():
                return folder
        except (LocalEntryNotFoundError, HFValidationError):
            pass
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f'Cannot get "{repo}" from the hub: {_first_line(error)}',
            tip="check the name and the connection, or give a local folder in diffusers layout.",
        ) from error


def _components(folder: Path) -> list[str]:
    """Return the names in model_index.json that stand for `[library, class]` and not for nothing."""
    index = _read_json(folder / "model_index.json")
    return [name for name, entry in index.items() if isinstance(entry, list) and entry[0]]


def _named(name: str) -> Checkpoint:
    entry = _catalogue()["checkpoints"][name]
    family = _catalogue()["families"][entry["family"]]
    folder = Path(str(importlib.resources.files("vgen"))) / entry["path"]
    return Checkpoint(
        name=name,
        family=entry["family"],
        source=entry["source"],
        folder=folder,
        repo=entry.get("repo"),
        revision=entry.get("revision"),
        licence=entry["licence"],
        files=tuple(CheckpointFile(**file) for file in entry["files"]),
        defaults=Defaults(**{**family["defaults"], **entry.get("defaults", {})}),
        knows=entry.get("knows", ""),
        rules=Rules(**{**family["rules"], **entry.get("rules", {})}),
    )


def _described(name: str, folder: Path, *, source: Source, repo: str | None, revision: str | None) -> Checkpoint:
    """Build a checkpoint from what its own configuration files say."""
    index = _read_json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    families: dict[str, Any] = _catalogue()["families"]
    family = next((key for key, value in families.items() if pipeline in value["pipelines"]), None)
    if family is None:
        known = [name for value in families.values() for name in value["pipelines"]]
        raise CheckpointError(
            f'"{name}" is a {pipeline}, a family that vgen cannot run.', tip=f"it runs: {', '.join(known)}."
        )
    rules = _rules(folder, index, Rules(**families[family]["rules"]))
    return Checkpoint(
        name=name,
        family=family,
        source=source,
        folder=folder,
        repo=repo,
        revision=revision,
        licence="",
        files=(),
        defaults=_defaults(folder, Defaults(**families[family]["defaults"])),
        knows="",
        rules=rules,
    )


def _defaults(folder: Path, defaults: Defaults) -> Defaults:
    """Replace the family's guidance scale by the checkpoint's own: its guider's, or none without a place for it."""
    guider = folder / "guider" / "guider_config.json"
    if guider.is_file():
        return replace(defaults, guidance_scale=float(_read_json(guider).get("guidance_scale", 1.0)))
    if not _read_json(folder / "transformer" / "config.json").get("guidance_embeds", True):
        return replace(defaults, guidance_scale=1.0)
    return defaults


def _rules(folder: Path, index: Mapping[str, Any], rules: Rules) -> Rules:
    """Replace the family's rules by what the configurations of the VAE and the transformer say."""
    transformer = _read_json(folder / "transformer" / "config.json")
    vae = _read_json(folder / "vae" / "config.json")
    # The families' VAEs name their factors differently; where they name none, the family's rule is theirs.
    spatial = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio")
    temporal = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio")
    patch_size = transformer.get("patch_size", (1, 2, 2))
    patch = patch_size if isinstance(patch_size, int) else max(patch_size[1:])
    size_multiple = spatial * patch if spatial else rules.size_multiple
    frame_multiple = temporal or rules.frame_multiple
    max_size, max_frames = rules.max_size // size_multiple * size_multiple, rules.max_frames
    if positions := transformer.get("rope_max_seq_len"):
        max_size, max_frames = size_multiple * positions, frame_multiple * (positions - 1) + 1
    only_size = rules.only_size
    if transformer.get("use_learned_positional_embeddings"):
        side = size_multiple // patch
        only_size = (transformer["sample_width"] * side, transformer["sample_height"] * side)
    known_frames = rules.known_frames or bool(index.get("expand_timesteps", False))
    needs_image = str(index.get("_class_name")).endswith("ImageToVideoPipeline") and not known_frames
    # An image encoder sees two images only where its transformer has places for both.
    sees_two = transformer.get("image_dim") is None or transformer.get("pos_embed_seq_len") is not None
    return replace(
        rules,
        size_multiple=size_multiple,
        frame_multiple=frame_multiple,
        max_size=max_size,
        max_frames=max_frames,
        only_size=only_size,
        known_frames=known_frames,
        needs_image=needs_image,
        last_image=rules.last_image and needs_image and sees_two,
        two_transformers=index.get("boundary_ratio") is not None,
        embedded_guidance=rules.embedded_guidance and bool(transformer.get("guidance_embeds", True)),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is no checkpoint in diffusers layout: it has no {path.name}.",
            tip="give the folder that holds model_index.json and one folder per component.",
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"Cannot read {path}: a JSON object is expected.")
    return content


def _component_files(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """Return the files that the components named in model_index.json are made of; raise where one is missing."""
    found = [folder / "model_index.json"]
    for component in _components(folder):
        directory = folder / component
        files = sorted(path for path in directory.glob("*") if path.is_file())
        if not files:
            raise CheckpointError(f"{directory} is missing or empty.", tip=_repair(checkpoint))
        for index in directory.glob("*.safetensors.index.json"):
            for shard in sorted(set(_read_json(index)["weight_map"].values())):
                if not (directory / shard).is_file():
                    raise CheckpointError(f"{directory / shard} is missing.", tip=_repair(checkpoint))
        if (directory / "config.json").is_file() and not any(p.suffix in (".safetensors", ".bin") for p in files):
            raise CheckpointError(f"{directory} has no weights.", tip=_repair(checkpoint))
        found += files
    return found


def _verify_file(checkpoint: Checkpoint, folder: Path, file: CheckpointFile, *, full: bool) -> None:
    path = folder / file.path
    if not path.is_file():
        raise CheckpointError(
            f'The checkpoint "{checkpoint.name}" is incomplete: {path} is missing.', tip=_repair(checkpoint)
        )
    size = path.stat().st_size
    if size != file.size:
        raise CheckpointError(f"{path} has {size} bytes, but {file.size} are expected.", tip=_repair(checkpoint))
    if full and sha256(path) != file.sha256:
        raise CheckpointError(f"{path} is damaged: its sha256 is not {file.sha256}.", tip=_repair(checkpoint))


def _verify_safetensors(checkpoint: Checkpoint, path: Path) -> None:
    """Compare the file's length with what its header says: 8 bytes of header length, a JSON header, the data."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (header_length,) = struct.unpack("<Q", file.read(8))
            if header_length > size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(header_length))
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no safetensors file.", tip=_repair(checkpoint)) from error
    expected = 8 + header_length + end
    if size != expected:
        raise CheckpointError(f"{path} has {size} bytes, but {expected} are expected.", tip=_repair(checkpoint))


def _repair(checkpoint: Checkpoint) -> str:
    if checkpoint.source == "embedded":
        return "install vgen again: its own checkpoint comes with the package."
    if checkpoint.source == "hub":
        return f"delete {checkpoint.folder} and run again: it is downloaded anew."
    return "copy or download the folder again."


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@functools.cache
def _catalogue() -> dict[str, Any]:
    import yaml

    resource = importlib.resources.files("vgen") / "checkpoints.yaml"
    try:
        text = resource.read_text(encoding="utf-8")
        catalogue = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"Cannot read {resource}: {_first_line(error)}", tip=_CATALOGUE_TIP) from error
    if not isinstance(catalogue, dict) or not {"families", "checkpoints"} <= catalogue.keys():
        said = text[:60].strip()
        raise CheckpointError(f'{resource} is no list of checkpoints: it says "{said}".', tip=_CATALOGUE_TIP)
    return catalogue


_CATALOGUE_TIP = (
    "in a checkout vgen/checkpoints.yaml is a link to ../checkpoints.yaml; where links were lost, copy that file "
    "there."
)


def _main(arguments: list[str]) -> int:
    """Print the `files:` block of a name's or folder's files: `python -m vgen.checkpoints hash NAME_OR_FOLDER`."""
    if len(arguments) != 2 or arguments[0] != "hash":
        print("usage: python -m vgen.checkpoints hash NAME_OR_FOLDER", file=sys.stderr)
        return UsageError.exit_code
    try:
        folder = _named(arguments[1]).folder if arguments[1] in names() else Path(arguments[1])
        if folder is None or not folder.is_dir():
            raise UsageError(f"There is no folder {folder}.")
        found = describe_files(folder)
    except VgenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("    files:")
    for file in found:
        values = ", ".join(f"{field.name}: {json.dumps(getattr(file, field.name))}" for field in fields(file))
        print(f"      - {{{values}}}")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
