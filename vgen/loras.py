"""LoRAs: how the user names one, which file that is, and whether it is one; all of it before a model is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vgen import hub, integrity
from vgen.errors import CheckpointError, UsageError
from vgen.integrity import PICKLES, CheckpointFile

# What diffusers and peft call the file by themselves.
USUAL_NAME = "pytorch_lora_weights.safetensors"

# Of two transformers that share the noise levels, the first has the higher ones.
TARGETS = {"high": ("transformer",), "low": ("transformer_2",), "both": ("transformer", "transformer_2")}

_TARGET = re.compile(rf"({'|'.join(TARGETS)})=(.*)", re.DOTALL)
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[^@]+))?")
_FILES = frozenset({".safetensors", *PICKLES})
_EXAMPLE = "write FILE.safetensors:SCALE or OWNER/NAME/FILE.safetensors:SCALE, such as style.safetensors:0.8"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA on one of a checkpoint's components, `scale` times: a safetensors file on this machine or on the hub.

    Of this machine it is `local`. Of the hub, an empty `file` is the only one that the repository has, and `revision`
    a branch, tag or commit. `text` is what the user wrote, empty for one of a preset. What is found out of a file is
    None or empty before: `sha256` is its hash, `num_layers` how many layers it changes and `matched` how many of
    them the model has; `unmatched` names the others, and what diffusers leaves out.
    """

    repo: str | None = None
    file: str = ""
    revision: str | None = None
    component: str = "transformer"
    scale: float = 1.0
    local: Path | None = None
    text: str = ""
    sha256: str | None = None
    num_layers: int | None = None
    matched: int | None = None
    unmatched: tuple[str, ...] = ()

    @property
    def path(self) -> Path | None:
        """Where the file is on this machine; None before it was downloaded."""
        if self.repo is None:
            return self.local
        locked = hub.lock(self.repo, self.revision)
        commit = locked.commit if locked else hub.cached_commit(self.repo, self.revision)
        path = hub.folder(self.repo, commit) / self.file if commit else None
        return path if path is not None and path.is_file() else None

    @property
    def name(self) -> str:
        """The file for people: its path, or its hub id with the file."""
        return str(self.local) if self.repo is None else "/".join(filter(None, (self.repo, self.file)))

    def to_dict(self) -> dict[str, Any]:
        """Return what is known of the LoRA as values that JSON can hold."""
        known = {
            "file": self.name,
            "revision": self.revision,
            "component": self.component,
            "scale": self.scale,
            "sha256": self.sha256,
            "num_layers": self.num_layers,
            "matched": self.matched,
            "unmatched": list(self.unmatched),
        }
        return {key: value for key, value in known.items() if value not in (None, [])}

    def report(self) -> str:
        """Return a sentence on which of its layers the model has."""
        name = self.name.rpartition("/")[2] + (" on the second transformer" if self.component != "transformer" else "")
        shown = ", ".join(self.unmatched[:3])
        if len(self.unmatched) > 3:
            shown += f" and {len(self.unmatched) - 3} more"
        rest = f"; unmatched: {shown}" if shown else ""
        return f"LoRA {name}: {self.matched} of {self.num_layers} layers matched{rest}."


def asked(texts: Sequence[str] | None, *, two_transformers: bool) -> tuple[Lora, ...]:
    """Return the LoRAs of `[high=|low=|both=]FILE|FOLDER|HUB_ID[:SCALE]`, one for each transformer that they change.

    The scale is 1 where none is given. Files of this machine are looked into, those of the hub are not asked for.
    Raises `UsageError` for what cannot be read as such, or does not say which of two transformers it is for, and
    `CheckpointError` for a file that is no LoRA in safetensors.
    """
    return tuple(lora for text in texts or () for lora in _asked(text, two_transformers=two_transformers))


def anchored(text: str, found: Lora | None = None) -> str:
    """Return the same with an absolute path, or with the file and the commit of the hub where they are known.

    `found` is what the text has turned out to be, where it was loaded.
    """
    target, source, scale = _parts(text)
    lora = found or _source(text, source)
    if lora.repo is None:
        assert lora.local is not None
        source = str(lora.local.absolute())
    else:
        source = lora.name
        locked = hub.lock(lora.repo, lora.revision)
        revision = locked.commit if locked and lora.path is not None else lora.revision
        source += f"@{revision}" if revision else ""
    return f"{target + '=' if target else ''}{source}:{scale!r}"


def local_files(texts: Sequence[str] | None) -> list[Path]:
    """Return those of the files that are on this machine and not of the hub."""
    found = [_source(text, _parts(text)[1]).local for text in texts or ()]
    return [path for path in found if path is not None]


def fetch(lora: Lora, progress: hub.Progress = hub.SILENT) -> Lora:
    """Return the LoRA with its file on this machine, its commit and its hash known. Raises `CheckpointError`."""
    if (repo := lora.repo) is not None:
        lora = replace(lora, file=lora.file or _only_file(lora))
        if lora.path is None:
            locked = hub.lock(repo, lora.revision)
            wanted = hub.only(hub.listing(repo, locked.commit if locked else lora.revision), lora.file)
            hub.download(replace(wanted, revision=lora.revision or hub.DEFAULT_REVISION), progress)
    lora = identify(lora)
    assert lora.path is not None, "downloaded just now"
    look_into(lora.path)
    return lora


def identify(lora: Lora) -> Lora:
    """Return the LoRA with its hash and, of the hub, its commit, where its file is on this machine."""
    path = lora.path
    if path is None or not path.is_file():
        return lora
    locked = _locked(lora)
    sha256 = locked.sha256 if locked else integrity.sha256(path)
    if lora.repo is None:
        return replace(lora, sha256=sha256)
    commit = path.parents[lora.file.count("/")].name
    return replace(lora, sha256=sha256, revision=commit)


def verify(lora: Lora, *, full: bool, of: str, tip: str) -> None:
    """Raise `CheckpointError` unless the file is here and whole: in its size and, with `full`, in its hash."""
    path = lora.path
    if path is None or not path.is_file():
        where = f'{lora.file} of "{lora.repo}" was not downloaded' if lora.repo else f"there is no file {lora.local}"
        raise CheckpointError(f'The checkpoint "{of}" is incomplete: {where}.', tip=tip)
    locked = _locked(lora)
    if locked is not None:
        integrity.check_file(path, locked, full=full, tip=tip)
    else:
        integrity.check_safetensors(path, tip=tip)


def look_into(path: Path) -> None:
    """Raise `CheckpointError` unless a file is safetensors, whole, and has the layers of a LoRA.

    Only its header is read.
    """
    if path.suffix in PICKLES:
        raise _pickle_refused(path)
    header = integrity.check_safetensors(path, tip="download or copy it again.")
    tensors = list(header)
    if any("dora_scale" in name or "lora_magnitude_vector" in name for name in tensors):
        raise CheckpointError(
            f"{path} is a DoRA: it also changes the weights' magnitudes, which is not supported.",
            tip="ask for a plain LoRA of the same.",
        )
    if not any(re.search(r"[._]lora[._](A|B|up|down)\b", name) for name in tensors):
        named = f'its tensors have names like "{tensors[0]}"' if tensors else "it has no tensors"
        raise CheckpointError(
            f"{path} is no LoRA: {named}.", tip="a LoRA's are called lora_A and lora_B, or lora_down and lora_up."
        )


def _asked(text: str, *, two_transformers: bool) -> list[Lora]:
    target, source, scale = _parts(text)
    lora = replace(_source(text, source), text=text, scale=scale)
    if lora.local is not None:
        look_into(lora.local)
    if target and not two_transformers:
        raise UsageError(f'"{target}=" says which of two transformers, and this model has one.', tip="leave it out.")
    if two_transformers and not target:
        raise UsageError(
            f'The model has two transformers, and "{text}" does not say which it is for.',
            tip=f"write --lora high={text} for the one of high noise, low={text}, or both={text}.",
        )
    return [replace(lora, component=component) for component in TARGETS.get(target, ("transformer",))]


def _parts(text: str) -> tuple[str, str, float]:
    """Return target, source and scale, of which the source is not empty."""
    target, source = found.groups() if (found := _TARGET.fullmatch(text)) else ("", text)
    scale = 1.0
    before, colon, after = source.rpartition(":")
    if colon and not re.search(r"[/\\]", after) and not _exists(Path(source)):
        source = before
        try:
            scale = float(after)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise UsageError(f'The scale "{after}" of the LoRA "{text}" is not a number.', tip=f"{_EXAMPLE}.")
    if not source:
        raise UsageError(f'"{text}" names no LoRA.', tip=f"{_EXAMPLE}.")
    return target, source, scale


def _source(text: str, source: str) -> Lora:
    path = Path(source)
    if source.startswith("~"):
        with suppress(RuntimeError):  # nobody is called so
            path = path.expanduser()
    if _exists(path):
        return Lora(local=_file_in(path) if path.is_dir() else path)
    found = _HUB_ID.fullmatch(source)
    # Two names with a slash are a repository, unless they are called like a file; of three, the first may be a folder.
    if found is None or (path.suffix in _FILES if found["file"] is None else _exists(path.parent)):
        raise UsageError(f'There is no LoRA "{source}".', tip=f"check the path, or {_EXAMPLE}.")
    file = found["file"] or ""
    if Path(file).suffix in PICKLES:
        raise _pickle_refused(Path(file))
    if file and not file.endswith(".safetensors"):
        raise UsageError(f'"{file}" in "{text}" is no safetensors file.', tip=f"{_EXAMPLE}.")
    return Lora(repo=found["repo"], file=file, revision=found["revision"])


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no file can be called so
        return False


def _file_in(folder: Path) -> Path:
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file()]
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights and (pickles := [name for name in names if Path(name).suffix in PICKLES]):
        raise _pickle_refused(folder / pickles[0])
    return folder / _chosen(weights, str(folder))


def _only_file(lora: Lora) -> str:
    """Return the file of a repository that has one. One that was downloaded will do where the hub cannot be asked."""
    assert lora.repo is not None
    locked = hub.lock(lora.repo, lora.revision)
    here = [file.path for file in locked.files if file.path.endswith(".safetensors")] if locked else []
    if USUAL_NAME in here:
        return USUAL_NAME
    try:
        everything = hub.listing(lora.repo, locked.commit if locked else lora.revision)
    except CheckpointError:
        if len(here) == 1:
            return here[0]
        raise
    weights = [file.path for file in everything.files if file.path.endswith(".safetensors")]
    if not weights and (pickles := [file.path for file in everything.files if Path(file.path).suffix in PICKLES]):
        raise _pickle_refused(Path(pickles[0]))
    return _chosen(weights, lora.repo)


def _chosen(weights: list[str], where: str) -> str:
    if USUAL_NAME in weights:
        return USUAL_NAME
    if len(weights) == 1:
        return weights[0]
    if not weights:
        raise CheckpointError(f'"{where}" has no LoRA: no file ends in .safetensors.', tip=f"{_EXAMPLE}.")
    raise UsageError(
        f'"{where}" has {len(weights)} files in safetensors, and which is meant was not said.',
        tip=f"write {where}/{weights[0]}; the others are: {', '.join(weights[1:])}.",
    )


def _locked(lora: Lora) -> CheckpointFile | None:
    """Return what the lock file says of a file of the hub."""
    locked = hub.lock(lora.repo, lora.revision) if lora.repo else None
    return next((file for file in locked.files if file.path == lora.file), None) if locked else None


def _pickle_refused(path: Path) -> CheckpointError:
    return integrity.pickle_refused(
        "The LoRA", path.name, tip="convert it where you trust it: safetensors.torch.save_file(torch.load(FILE), NEW)."
    )
