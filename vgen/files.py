"""Writing files so that a reader finds all of one or nothing, and the room that there is for them."""

from __future__ import annotations

import errno
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vgen.errors import VgenError, reason_of

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what is written there takes the place of `path` when the block succeeds.

    A file or a folder may be written; a file never takes the place of a folder. Whatever ends the block early, an
    interrupt too, leaves `path` as it was and nothing beside it. Raises `VgenError` for a full disk or a folder that
    cannot be written to.
    """
    part = path.absolute().with_name(f".vgen-{secrets.token_hex(6)}{path.suffix}")
    try:
        yield part
        if part.is_dir():
            _remove(path)
        part.replace(path)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        with suppress(OSError):
            _remove(part)


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, all of it or nothing."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors as `atomic` does; each is contiguous."""
    from safetensors.torch import save

    content = save(dict(tensors), dict(metadata))
    with atomic(path) as part:
        part.write_bytes(content)


def not_written(path: Path, error: OSError) -> VgenError:
    """Return the error for people: which file, why, and what to do."""
    tips = {
        errno.ENOSPC: "free some space, or choose another disk with --output.",
        errno.EDQUOT: "free some space, or choose another disk with --output.",
        errno.ENAMETOOLONG: "choose a shorter name with --output.",
    }
    tip = tips.get(error.errno or 0, "choose a folder that you can write to with --output.")
    return VgenError(f"Could not write {path}: {reason_of(error)}.", tip=tip)


def free_space(path: Path) -> tuple[int, Path]:
    """Return the bytes that are free on the disk of a path, which need not be there yet, and what is there of it."""
    existing = next(part for part in (path, *path.parents) if part.exists())
    return shutil.disk_usage(existing).free, existing


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
