"""The Hugging Face hub: what a repository has, which of it is needed, and how it gets here whole.

Files go where every tool of the hub keeps them (`HF_HOME`), each checked against the hub's own hash as it arrives.
What was pulled is written down in a lock file beside it, so that a name means the same files until it is pulled again.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vgen import files, integrity
from vgen.errors import CheckpointError, VgenError, first_line
from vgen.integrity import PICKLES, CheckpointFile

DEFAULT_REVISION = "main"

# The only weights that diffusers and transformers look for by themselves: no fp16 twins, no original formats.
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:-\d{5}-of-\d{5})?\.safetensors")
_WEIGHTS_INDEX = re.compile(r"(?:diffusion_pytorch_model|model)\.safetensors\.index\.json")
_SETTINGS = frozenset({".jinja", ".json", ".model", ".txt"})
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECONDS_TO_ANSWER = 20.0


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file on the hub: `size` in bytes; its sha256 where the hub stores it as a large file, else its git blob id."""

    path: str
    size: int
    sha256: str | None
    blob_id: str


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Files of a hub repository as of one commit."""

    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """All files together, in bytes."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, kw_only=True)
class Lock:
    """What was pulled of a repository and is here whole: the commit that its revision stood for, and the files."""

    commit: str
    files: tuple[CheckpointFile, ...]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What is told while files arrive: what is about to (and how many bytes are missing), bytes that came, the end."""

    on_begin: Callable[[Listing, int], None] = lambda listing, missing: None
    on_bytes: Callable[[int], None] = lambda num_bytes: None
    on_end: Callable[[], None] = lambda: None


SILENT = Progress()


def readable(num_bytes: float) -> str:
    """Return a number of bytes as people write it: "28.9 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes:.0f} bytes"


def listing(repo: str, revision: str | None = None) -> Listing:
    """Return every file of a repository with its size and hash; one question to the hub. Raises `CheckpointError`."""
    from huggingface_hub import HfApi

    revision = revision or DEFAULT_REVISION
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_SECONDS_TO_ANSWER)
    except _expected_errors() as error:
        raise _for_people(repo, revision, error) from error
    return Listing(
        repo=repo,
        revision=revision,
        commit=info.sha,
        files=tuple(
            RemoteFile(
                path=file.rfilename,
                size=file.lfs.size if file.lfs else file.size,
                sha256=file.lfs.sha256 if file.lfs else None,
                blob_id=file.blob_id,
            )
            for file in info.siblings
        ),
    )


def needed(everything: Listing) -> Listing:
    """Return the part of a checkpoint's repository that it is loaded from.

    That is model_index.json and, for each component in it, its settings and one copy of its weights in safetensors:
    the copy that diffusers or transformers would choose. Raises `CheckpointError` when there is no such copy.
    """
    return select(everything, lambda path: _read_remote_json(everything, path))


def select(everything: Listing, read_json: Callable[[str], Mapping[str, Any]]) -> Listing:
    """As `needed`, with a function that returns the content of one of the repository's JSON files."""
    by_path = {file.path: file for file in everything.files}
    if "model_index.json" not in by_path:
        raise CheckpointError(
            f'"{everything.repo}" is no checkpoint in diffusers layout: it has no model_index.json.',
            tip="look for a repository of the same model whose name ends in -Diffusers.",
        )
    chosen = ["model_index.json"]
    for component, library in _components(read_json("model_index.json")):
        inside = [path.removeprefix(f"{component}/") for path in by_path if path.startswith(f"{component}/")]
        names = [name for name in inside if "/" not in name]
        weights = _weights(component, names, library, read_json)
        pickles = [name for name in names if Path(name).suffix in PICKLES]
        if "config.json" in names and not weights and pickles:
            raise integrity.pickle_refused(f'The {component} of "{everything.repo}"', pickles[0])
        settings = [name for name in names if Path(name).suffix in _SETTINGS and ".index." not in name]
        chosen += [f"{component}/{name}" for name in (*settings, *weights)]
    return _part(everything, sorted(chosen))


def only(everything: Listing, path: str) -> Listing:
    """Return the listing of one file, such as a LoRA's. Raises `CheckpointError` when it is not there."""
    if not any(file.path == path for file in everything.files):
        raise CheckpointError(f'"{everything.repo}" has no file {path} on the hub.', tip="it may have been renamed.")
    return _part(everything, [path])


def missing(wanted: Listing, *, full: bool = False) -> tuple[RemoteFile, ...]:
    """Return the files that are not here in their full size or, with `full`, do not have the hub's hash."""
    root = folder(wanted.repo, wanted.commit)
    return tuple(file for file in wanted.files if not _is_here(root / file.path, file, full=full))


def download(wanted: Listing, progress: Progress = SILENT, *, full: bool = False) -> Path:
    """Bring the files here, check them, lock them, and return their folder.

    What is here in its full size stays; with `full` it is hashed, and what is damaged comes anew. A connection that
    breaks is taken up where it broke, and what arrives with another hash than the hub's is removed. Raises
    `CheckpointError` for too little space, a damaged file and a hub that does not answer.
    """
    from huggingface_hub import hf_hub_download

    absent = missing(wanted, full=full)
    _require_space(wanted, sum(file.size for file in absent))
    progress.on_begin(wanted, sum(file.size for file in absent))
    root = folder(wanted.repo, wanted.commit)
    try:
        for file in absent:
            _remove(root / file.path)
            hf_hub_download(wanted.repo, file.path, revision=wanted.commit, tqdm_class=_bar(progress.on_bytes))
            _check_arrived(root / file.path, file)
    except _expected_errors() as error:
        raise _for_people(wanted.repo, wanted.revision, error) from error
    finally:
        progress.on_end()
    _write_lock(wanted, root)
    return root


def folder(repo: str, commit: str) -> Path:
    """Return where the hub's cache has, or would have, the files of a commit."""
    return _repository(repo) / "snapshots" / commit


def lock(repo: str, revision: str | None = None) -> Lock | None:
    """Return what was pulled as this revision, or None when nothing was, or when it was deleted since."""
    entries = _read_locks(repo)
    entry = entries.get(revision or DEFAULT_REVISION)
    if entry is None:
        entry = next((locked for locked in entries.values() if locked["commit"] == revision), None)
    if entry is None or not folder(repo, entry["commit"]).is_dir():
        return None
    return Lock(commit=entry["commit"], files=tuple(CheckpointFile(**file) for file in entry["files"]))


def cached_commit(repo: str, revision: str | None = None) -> str | None:
    """Return the commit of a revision that any tool of the hub has put into the cache, or None."""
    revision = revision or DEFAULT_REVISION
    reference = _repository(repo) / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    return commit if _COMMIT.fullmatch(commit) and folder(repo, commit).is_dir() else None


def card(repo: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """Return the folder of a repository with at least the small files that match `patterns`.

    What is in the cache will do, so that nothing is asked where it is. Raises `CheckpointError`.
    """
    from huggingface_hub import snapshot_download

    commit = cached_commit(repo, revision)
    if commit is not None:
        cached = folder(repo, commit)
        if (cached / "model_index.json").is_file() and (cached / "transformer" / "config.json").is_file():
            return cached
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), tqdm_class=_bar()))
    except _expected_errors() as error:
        raise _for_people(repo, revision or DEFAULT_REVISION, error) from error


def _components(index: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, library) of what stands in model_index.json for `[library, class]` and not for nothing."""
    return [(name, entry[0]) for name, entry in index.items() if isinstance(entry, list) and entry[0]]


def _weights(
    component: str, names: list[str], library: str, read_json: Callable[[str], Mapping[str, Any]]
) -> list[str]:
    """Return one copy of a component's weights: transformers takes a single file before shards, diffusers after."""
    index = next((name for name in names if _WEIGHTS_INDEX.fullmatch(name)), None)
    single = [name for name in names if _WEIGHTS.fullmatch(name) and "-of-" not in name]
    if single and (index is None or library == "transformers"):
        return single
    if index is None:
        return []
    return [index, *sorted(set(read_json(f"{component}/{index}")["weight_map"].values()))]


def _part(everything: Listing, paths: list[str]) -> Listing:
    by_path = {file.path: file for file in everything.files}
    if gone := [path for path in paths if path not in by_path]:
        raise CheckpointError(
            f'"{everything.repo}" is incomplete on the hub: {gone[0]} is missing.',
            tip="try another --revision, or tell its authors.",
        )
    return Listing(
        repo=everything.repo,
        revision=everything.revision,
        commit=everything.commit,
        files=tuple(by_path[path] for path in paths),
    )


def _read_remote_json(everything: Listing, path: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        local = hf_hub_download(everything.repo, path, revision=everything.commit, tqdm_class=_bar())
        content: dict[str, Any] = json.loads(Path(local).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f'{path} of "{everything.repo}" is not JSON.') from error
    except _expected_errors() as error:
        raise _for_people(everything.repo, everything.revision, error) from error
    return content


def _is_here(path: Path, file: RemoteFile, *, full: bool) -> bool:
    return path.is_file() and path.stat().st_size == file.size and not (full and _hash(path, file) != _listed(file))


def _hash(path: Path, file: RemoteFile) -> str:
    return integrity.sha256(path) if file.sha256 is not None else integrity.git_blob_id(path)


def _listed(file: RemoteFile) -> str:
    return file.sha256 or file.blob_id


def _remove(path: Path) -> None:
    """Remove a file of the hub's cache: the link, and what it leads to, which the client would only link again."""
    if path.is_symlink():
        path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _check_arrived(path: Path, file: RemoteFile) -> None:
    """Remove a file that is not what the hub lists, so that the next pull gets it again, and raise."""
    found = _hash(path, file)
    if found == _listed(file):
        return
    _remove(path)
    raise CheckpointError(
        f"{file.path} arrived damaged and was removed: its hash is {found}, but the hub lists {_listed(file)}.",
        tip="pull again; what arrived well is kept. If it stays like this, a proxy on the way changes files.",
    )


def _require_space(wanted: Listing, num_bytes: int) -> None:
    free, existing = files.free_space(_repository(wanted.repo))
    if num_bytes > free:
        raise CheckpointError(
            f'"{wanted.repo}" needs {readable(num_bytes)} more on the disk of {existing}, which has {readable(free)}.',
            tip="free some space, or keep models on another disk: set HF_HOME to a folder there.",
        )


def _write_lock(wanted: Listing, root: Path) -> None:
    """Add to the repository's lock file: the hub's own sha256 where it has one, else that of the checked file."""
    locks = _read_locks(wanted.repo)
    before = locks.get(wanted.revision, {})
    kept = {file["path"]: file for file in before.get("files", [])} if before.get("commit") == wanted.commit else {}
    for file in wanted.files:
        sha256 = file.sha256 or integrity.sha256(root / file.path)
        kept[file.path] = asdict(CheckpointFile(path=file.path, size=file.size, sha256=sha256))
    locks[wanted.revision] = {"commit": wanted.commit, "files": [kept[path] for path in sorted(kept)]}
    files.write_text(_lock_path(wanted.repo), json.dumps({"repo": wanted.repo, "revisions": locks}, indent=1) + "\n")


def _read_locks(repo: str) -> dict[str, Any]:
    try:
        locks: dict[str, Any] = json.loads(_lock_path(repo).read_text(encoding="utf-8"))["revisions"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return locks


def _lock_path(repo: str) -> Path:
    return _repository(repo) / "vgen-lock.json"


def _repository(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _bar(on_bytes: Callable[[int], None] = lambda num_bytes: None) -> Any:
    """Return what the hub's client takes for a progress bar: a class that tells bytes and draws nothing."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            on_bytes(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Take what the client tells of the network beside what it has written: the same bytes again."""

    return Bar


def _expected_errors() -> tuple[type[Exception], ...]:
    """Return what asking the hub may raise, less our own errors: HTTP, connections, disks, and names that are none."""
    import httpx2
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    return (httpx2.HTTPError, EntryNotFoundError, HFValidationError, OSError)


def _for_people(repo: str, revision: str, error: Exception) -> VgenError:
    """Return the error for people. It names no header, so no token either."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    log_in = "log in with: hf auth login"
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if isinstance(cause, GatedRepoError):
        return CheckpointError(
            f'"{repo}" is gated: its authors want you to accept their terms first ({status}).',
            tip=f"accept them at {constants.ENDPOINT}/{repo}, then {log_in}; after that, pull again.",
        )
    if isinstance(cause, RevisionNotFoundError):
        return CheckpointError(f'"{repo}" has no revision "{revision}".', tip="leave --revision out for the newest.")
    if isinstance(cause, RepositoryNotFoundError):
        return CheckpointError(
            f'There is no "{repo}" on the hub, or it is private ({status}).',
            tip=f"check the name; if it is private, {log_in}.",
        )
    if isinstance(cause, RemoteEntryNotFoundError):
        return CheckpointError(
            f'A file of "{repo}" is missing on the hub: {first_line(cause)}', tip="try another --revision."
        )
    if isinstance(cause, HFValidationError):
        return CheckpointError(f'"{repo}" is no hub id: {first_line(cause)}', tip="a hub id looks like owner/name.")
    if status in (401, 403):
        return CheckpointError(
            f'The hub does not let you have "{repo}" ({status}).',
            tip=f"your token may be old or too narrow: {log_in}.",
        )
    if isinstance(cause, OfflineModeIsEnabled):
        return CheckpointError(
            f'"{repo}" is not (wholly) on this machine, and HF_HUB_OFFLINE forbids to ask the hub.',
            tip="unset HF_HUB_OFFLINE, or give a local folder in diffusers layout.",
        )
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f'The disk became full while "{repo}" arrived. What arrived whole is kept.',
            tip="free some space and pull again, or keep models on another disk: set HF_HOME to a folder there.",
        )
    if isinstance(cause, PermissionError):
        return CheckpointError(f"Cannot write {cause.filename}.", tip="set HF_HOME to a folder that you may write to.")
    reason = f"it answered {status}" if status is not None else f"{type(cause).__name__}: {first_line(cause)}"
    return CheckpointError(
        f'Cannot get "{repo}" from {constants.ENDPOINT}: {reason}',
        tip="check the connection and try again (what arrived whole is kept), or give a local folder.",
    )
