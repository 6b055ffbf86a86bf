"""Checkpoints by name, folder or hub id: where they are, what they take and can do, and whether they are whole."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import vgen
from vgen import hub, integrity, loras
from vgen.errors import CheckpointError, UsageError, VgenError, did_you_mean, first_line
from vgen.integrity import PICKLES, CheckpointFile, describe_files
from vgen.loras import Lora

Source = Literal["embedded", "folder", "hub"]

# What the hub is asked for before anything heavy: enough to know the family, the sizes and the defaults.
_CARD_PATTERNS = ("model_index.json", "vgen.json", "*/config.json", "*/*_config.json")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")

# What vgen writes into a folder of its own, and the newest version of it that this one reads.
CARD, CARD_FORMAT = "vgen.json", 1

# Hashing reads about 1 GB in a second: below this it is done before every load, above it when it is asked for.
HASHED_AT_LOAD = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a checkpoint takes when the user says nothing; sizes in pixels, `fps` in frames per second.

    `guidance_scale_2` is that of a second transformer, where it differs. `shift` is the recommended shift of the
    flow's schedule; None: as the checkpoint's own scheduler says. `timesteps`, of 1000, are the noise levels that a
    few-step student was trained at, before the shift; empty for other models. `attention` is the sparse attention
    that it was trained with and cannot do without; empty for the dense one.
    """

    width: int
    height: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    negative_prompt: str
    max_sequence_length: int
    guidance_scale_2: float | None = None
    shift: float | None = None
    timesteps: tuple[int, ...] = ()
    attention: str = ""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which sizes and lengths a checkpoint takes.

    Sizes are multiples of `size_multiple` up to `max_size` pixels, or with `fixed_size` one of the checkpoint's
    `sizes` and no other; frame counts are `frame_multiple` * k + 1 up to `max_frames`.
    """

    size_multiple: int
    frame_multiple: int
    max_size: int
    max_frames: int
    fixed_size: bool = False


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a checkpoint can do, and what can be done with it.

    `image_to_video` is from a first frame, in whatever way the family has, and `last_image` is to a last one, too;
    `known_frames` is from any frames, which needs a timestep per token; `identity` is from a face. With
    `embedded_guidance` the guidance scale is an input of the model and costs no second pass. `two_transformers` share
    the noise levels and may have a guidance scale each. `context_parallel` is over several GPUs, `attention` by other
    methods than the dense one.
    """

    text_to_video: bool = False
    image_to_video: bool = False
    last_image: bool = False
    known_frames: bool = False
    identity: bool = False
    audio: bool = False
    embedded_guidance: bool = False
    two_transformers: bool = False
    lora: bool = False
    cache: bool = False
    context_parallel: bool = False
    attention: bool = False

    @property
    def needs_image(self) -> bool:
        """Whether it only continues an image."""
        return self.image_to_video and not self.text_to_video


@dataclass(frozen=True, kw_only=True)
class Component:
    """A part of a checkpoint that has weights, such as "transformer", and how many parameters it has."""

    name: str
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Peak:
    """GPU memory in 10^9 bytes that a run was reported to take: all on the GPU, or with components offloaded."""

    whole: float | None = None
    offload: float | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found: its family, its folder in diffusers layout (None: not downloaded), and its rules.

    `knows` is one sentence on what a small model can show; it is empty for a model without such a limit. `permits` is
    one on the licence. `peak` and `download_gb` (in 10^9 bytes) are known for names of the catalogue, `components` for
    these and for weights that are on this machine. Of one on the hub, `revision` is the commit where it is known, and
    `follows` the branch, tag or commit that was asked for (None: the newest). `quantization` is the scheme of one that
    vgen has quantized. Of one that is `streamed` the weights that can be quantized are read from their files each time
    that they are used, rather than once.
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
    can: Capabilities = Capabilities()
    permits: str = ""
    download_gb: float | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    components: tuple[Component, ...] = ()
    peak: Peak = Peak()
    loras: tuple[Lora, ...] = ()
    follows: str | None = None
    quantization: str = ""
    streamed: bool = False

    @property
    def anchored_name(self) -> str:
        """The name with the commit that it stands for, where that is known: it means the same on any day."""
        name = self.name.partition("@")[0]
        return f"{name}@{self.revision}" if self.source == "hub" and self.revision else name

    def weights_gb(self, *, offload: bool = False, dtype: str = "bfloat16") -> float | None:
        """Return what the weights take in memory, in 10^9 bytes: the VAE in float32, the rest in `dtype`.

        With `offload` one component is there at a time, so that the largest counts. None where they are not known.
        """
        width = 4 if dtype == "float32" else 2
        sizes = [part.parameters * (4 if part.name == "vae" else width) / 1e9 for part in self.components]
        return (max(sizes) if offload else sum(sizes)) if sizes else None


def names() -> list[str]:
    """Return the names of `checkpoints.yaml`, in its order."""
    return list(_catalogue()["checkpoints"])


def resolve(model: str) -> Checkpoint:
    """Return the checkpoint of a name in `checkpoints.yaml`, a folder, or a hub id, the latter two `[@revision]`.

    For a name nothing is asked, whether it is downloaded or not. Of another hub id only the small configuration files
    are fetched, and nothing when they are in the local cache. Raises `UsageError` for a name that is none of the
    three, and `CheckpointError` for a folder that is no checkpoint or one of a family that vgen does not know.
    """
    name, _, revision = model.partition("@")
    if name in names():
        return _named(name, revision or None)
    path = _existing(model)
    if path is not None and path.is_dir():
        return _described(model, path, source="folder", repo=None, revision=None)
    if path is not None:
        raise UsageError(
            f'"{model}" is a file, but a checkpoint is a folder in diffusers layout.',
            tip="give the folder that holds model_index.json.",
        )
    if _HUB_ID.fullmatch(name):
        if (listed := _listed_as(name)) is not None:
            return _named(listed, revision or None)
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
        return replace(_named(checkpoint.name, revision), loras=checkpoint.loras)
    return replace(_of_hub(checkpoint.name, checkpoint.repo, revision), loras=checkpoint.loras)


def _listed_as(repo: str) -> str | None:
    """Return the name that the catalogue has for a hub repository."""
    entries = _catalogue()["checkpoints"].items()
    return next((name for name, entry in entries if entry.get("repo") == repo), None)


def _entry(name: str) -> dict[str, Any]:
    """Return a catalogue's entry; of a preset, its base with what differs put in place."""
    entry: dict[str, Any] = _catalogue()["checkpoints"][name]
    if "base" not in entry:
        return entry
    base = _entry(entry["base"])
    defaults = {**base.get("defaults", {}), **entry.get("defaults", {})}
    return {**base, **entry, "defaults": defaults}


def _named(name: str, revision: str | None) -> Checkpoint:
    entry = _entry(name)
    family = _catalogue()["families"][entry["family"]]
    repo = entry.get("repo")
    follows = revision = revision or entry.get("revision")
    files = tuple(CheckpointFile(**file) for file in entry.get("files", []))
    folder: Path | None
    if repo is None:
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
        permits=_catalogue()["licences"][entry["licence"]],
        files=files,
        defaults=_defaults({**family["defaults"], **entry.get("defaults", {})}),
        knows=entry.get("knows", ""),
        rules=Rules(**{**family["rules"], **entry.get("rules", {})}),
        can=_capabilities([*family["can"], *entry["can"]]),
        download_gb=entry.get("download_gb"),
        sizes=tuple((width, height) for width, height in entry["sizes"]),
        components=tuple(Component(name=part, parameters=n) for part, n in entry.get("parameters", {}).items())
        or _components(folder if repo else None),
        peak=Peak(**entry.get("peak_gb", {})),
        loras=tuple(Lora(**lora) for lora in entry.get("loras", [])),
        follows=follows,
    )


def _cached(repo: str, revision: str | None) -> tuple[Path | None, str | None, tuple[CheckpointFile, ...]]:
    """Return folder, commit and files of what was pulled; of what another tool has downloaded, the first two."""
    if (locked := hub.lock(repo, revision)) is not None:
        return hub.folder(repo, locked.commit), locked.commit, locked.files
    if (commit := hub.cached_commit(repo, revision)) is not None:
        return hub.folder(repo, commit), commit, ()
    return None, revision, ()


def _of_hub(name: str, repo: str, revision: str | None) -> Checkpoint:
    """Return the checkpoint of a hub id that the catalogue does not have, as its own small files describe it."""
    locked = hub.lock(repo, revision)
    folder = hub.folder(repo, locked.commit) if locked else hub.card(repo, revision, _CARD_PATTERNS)
    found = _described(name, folder, source="hub", repo=repo, revision=folder.name)
    return replace(found, files=locked.files if locked else (), follows=revision)


def _described(name: str, folder: Path, *, source: Source, repo: str | None, revision: str | None) -> Checkpoint:
    """Build a checkpoint from what its own configuration files say, or from the card of one that vgen has written."""
    if (folder / CARD).is_file():
        return _from_card(name, folder, source=source, repo=repo, revision=revision)
    index = _read_json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    families: dict[str, Any] = _catalogue()["families"]
    family = next((key for key, value in families.items() if pipeline in value["pipelines"]), None)
    if family is None:
        known = [name for value in families.values() for name in value["pipelines"]]
        raise CheckpointError(
            f'"{name}" is a {pipeline}, a family that vgen cannot run.', tip=f"it runs: {', '.join(known)}."
        )
    kind = families[family]["pipelines"][pipeline]
    transformer = _read_json(folder / "transformer" / "config.json")
    rules = _rules(folder, transformer, families[family])
    return Checkpoint(
        name=name,
        family=family,
        source=source,
        folder=folder,
        repo=repo,
        revision=revision,
        licence="",
        files=(),
        defaults=_defaults(
            {**families[family]["defaults"], **kind.get("defaults", {}), **_guidance(folder, transformer)}
        ),
        knows="",
        rules=rules,
        can=_what_it_can(index, transformer, _capabilities([*families[family]["can"], *kind["can"]])),
        sizes=_fixed_sizes(transformer, rules),
        components=_components(folder),
    )


def _components(folder: Path | None) -> tuple[Component, ...]:
    """Return the components whose weights are in a folder, counted in the headers of their files; none if unreadable.

    What is missing or damaged is told by `verify`, before anything is loaded.
    """
    if folder is None:
        return ()
    try:
        found = {name: _weight_files(folder / name) for name in _read_json(folder / "model_index.json")}
        counted = {name: sum(map(integrity.num_parameters, files)) for name, files in found.items() if files}
    except (OSError, CheckpointError):
        return ()
    return tuple(Component(name=name, parameters=number) for name, number in counted.items())


def _weight_files(component: Path) -> list[Path]:
    """Return the files that a component is loaded from: its shards, or the one that is no other variant."""
    for shards in sorted(component.glob("*.safetensors.index.json")):
        return [component / shard for shard in sorted(set(_read_json(shards)["weight_map"].values()))]
    return [path for path in sorted(component.glob("*.safetensors")) if path.name.count(".") == 1]


def _from_card(name: str, folder: Path, *, source: Source, repo: str | None, revision: str | None) -> Checkpoint:
    card = _read_json(folder / CARD)
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
            defaults=_defaults(card["defaults"]),
            knows=card["knows"],
            rules=Rules(**card["rules"]),
            can=Capabilities(**card["can"]),
            sizes=tuple((width, height) for width, height in card["sizes"]),
            quantization=card["quantization"],
            # Two bytes count as a parameter, as of other weights: those of integers are fewer than their number tells.
            components=tuple(
                replace(part, parameters=sum(path.stat().st_size for path in _weight_files(folder / part.name)) // 2)
                if part.name in ("transformer", "transformer_2")
                else part
                for part in _components(folder)
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CARD} is damaged: {error!r}.", tip="copy or write the folder again."
        ) from error


def _defaults(values: Mapping[str, Any]) -> Defaults:
    return Defaults(**{**values, "timesteps": tuple(values.get("timesteps", ()))})


def _guidance(folder: Path, transformer: Mapping[str, Any]) -> dict[str, float]:
    """Return the checkpoint's own guidance scale: its guider's, or none where a distilled one has no place for it."""
    guider = folder / "guider" / "guider_config.json"
    if guider.is_file():
        return {"guidance_scale": float(_read_json(guider).get("guidance_scale", 1.0))}
    return {} if transformer.get("guidance_embeds", True) else {"guidance_scale": 1.0}


def _capabilities(words: list[str]) -> Capabilities:
    return Capabilities(**{word.replace("-", "_"): True for word in words})


def _what_it_can(index: Mapping[str, Any], transformer: Mapping[str, Any], can: Capabilities) -> Capabilities:
    """Add what model_index.json switches on to the capabilities of a pipeline, and leave out what a model lacks."""
    if index.get("expand_timesteps"):
        can = replace(can, text_to_video=True, image_to_video=True, known_frames=True, last_image=False)
    # An image encoder sees two images only where its transformer has places for both.
    sees_two = transformer.get("image_dim") is None or transformer.get("pos_embed_seq_len") is not None
    return replace(
        can,
        last_image=can.last_image and sees_two,
        two_transformers=index.get("boundary_ratio") is not None,
        embedded_guidance=can.embedded_guidance and bool(transformer.get("guidance_embeds", True)),
    )


def _rules(folder: Path, transformer: Mapping[str, Any], family: Mapping[str, Any]) -> Rules:
    """Return the family's rules with those replaced that the configurations of VAE and transformer tell.

    The VAE says how many pixels and frames one latent stands for, under one of two names, and the transformer how many
    latents a token does and how many tokens or frames it has positions for.
    """
    rules = Rules(**family["rules"])
    vae = _read_json(folder / "vae" / "config.json")
    spatial = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio")
    temporal = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio")
    size_multiple = spatial * _patch(transformer) if spatial else rules.size_multiple
    frame_multiple = temporal * family.get("latent_frames_at_once", 1) if temporal else rules.frame_multiple
    max_size, max_frames = rules.max_size // size_multiple * size_multiple, rules.max_frames
    if positions := transformer.get("rope_max_seq_len"):
        max_size, max_frames = size_multiple * positions, frame_multiple * (positions - 1) + 1
    elif "sample_frames" in transformer and not transformer.get("patch_size_t"):
        # CogVideoX 1.0; of 1.5, whose tokens span two latent frames, this is the smaller of two lengths.
        max_frames = transformer["sample_frames"]
    return Rules(
        size_multiple=size_multiple,
        frame_multiple=frame_multiple,
        max_size=max_size,
        max_frames=max_frames,
        fixed_size=bool(transformer.get("use_learned_positional_embeddings")),
    )


def _fixed_sizes(transformer: Mapping[str, Any], rules: Rules) -> tuple[tuple[int, int], ...]:
    """Return the one size of a model whose positions are learned; of others the configurations tell none."""
    if not rules.fixed_size:
        return ()
    pixels = rules.size_multiple // _patch(transformer)
    return ((transformer["sample_width"] * pixels, transformer["sample_height"] * pixels),)


def _patch(transformer: Mapping[str, Any]) -> int:
    """Return how many latents a token spans along a side."""
    patch = transformer.get("patch_size", (1, 2, 2))
    return patch if isinstance(patch, int) else max(patch[1:])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is no checkpoint in diffusers layout: it has no {path.name}.",
            tip="give the folder that holds model_index.json and one folder per component.",
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"Cannot read {path}: a JSON object is expected.")
    return content


def _component_files(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """Return the files that the components named in model_index.json are made of; raise where one is missing."""
    found = [folder / "model_index.json"]
    index = _read_json(folder / "model_index.json")
    for component in (name for name, entry in index.items() if isinstance(entry, list) and entry[0]):
        directory = folder / component
        files = sorted(path for path in directory.glob("*") if path.is_file())
        if not files:
            raise CheckpointError(f"{directory} is missing or empty.", tip=_repair(checkpoint))
        for shards in directory.glob("*.safetensors.index.json"):
            for shard in sorted(set(_read_json(shards)["weight_map"].values())):
                if not (directory / shard).is_file():
                    raise CheckpointError(f"{directory / shard} is missing.", tip=_repair(checkpoint))
        if (directory / "config.json").is_file() and not any(path.suffix == ".safetensors" for path in files):
            if pickles := [path.name for path in files if path.suffix in PICKLES]:
                raise integrity.pickle_refused(str(directory), pickles[0])
            raise CheckpointError(f"{directory} has no weights.", tip=_repair(checkpoint))
        found += files
    return found


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


def _repair(checkpoint: Checkpoint) -> str:
    if checkpoint.source == "embedded":
        return "install vgen again: its own checkpoint comes with the package."
    if checkpoint.source == "hub":
        return f"get what is missing or damaged anew: vgen models pull --full {checkpoint.name}"
    return "copy or download the folder again."


@functools.cache
def _catalogue() -> dict[str, Any]:
    import yaml

    resource = importlib.resources.files("vgen") / "checkpoints.yaml"
    try:
        text = resource.read_text(encoding="utf-8")
        catalogue = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"Cannot read {resource}: {first_line(error)}", tip=_CATALOGUE_TIP) from error
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
        folder = resolve(arguments[1]).folder if arguments[1] in names() else Path(arguments[1])
        if folder is None or not folder.is_dir():
            raise UsageError(f"There is no folder {folder or arguments[1]}.")
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
