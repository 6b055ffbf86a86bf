"""Where a run's videos go, checked before the run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from vgen import manifest, naming
from vgen.batch import PlannedLine
from vgen.errors import UsageError, VgenError
from vgen.files import not_written

DEFAULT_FOLDER = Path("outputs")
# The formats of video.py, named here too so that a wrong one is refused before numpy is loaded; a test compares them.
LATENTS = ".latents.safetensors"
SUFFIXES = (".mp4", ".webm", ".gif", ".png")


def choose(output: Path | None, lines: Sequence[PlannedLine], when: datetime) -> list[Path]:
    """Return one path per line.

    A name with a suffix is the file itself, with the line's label put before the suffix; a name without one is a
    folder for default names, as is "outputs" when nothing is given. Raises `UsageError` for any other suffix.
    """
    if output is None or is_folder(output):
        folder = output or DEFAULT_FOLDER
        return _distinct([folder / naming.default_name(line.plan.prompt, line.plan.seed, when) for line in lines])
    check_suffix(output)
    return [output.with_name("-".join(filter(None, (output.stem, line.label))) + output.suffix) for line in lines]


def is_folder(output: Path) -> bool:
    """Return whether videos go into `output` by names of their own, rather than to `output` itself."""
    return output.suffix == "" or (output.suffix.lower() not in SUFFIXES and _exists(output) and output.is_dir())


def check_suffix(output: Path) -> None:
    """Raise `UsageError` unless the name ends as a video that vgen can write."""
    if output.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f'"{output.name}" ends in "{output.suffix}", which is no format that vgen writes.',
            tip=f"end the name in one of {', '.join(SUFFIXES)}; .png makes a folder of frames.",
        )


def check_folder(folder: Path) -> None:
    """Raise `UsageError` for a folder of several things whose name is that of one video, or which is a file."""
    if folder.suffix.lower() in SUFFIXES or (_exists(folder) and not folder.is_dir()):
        raise UsageError(f"{folder} is to be a folder.", tip="choose another --output, without a video's suffix.")


def latents_path(output: Path) -> Path:
    """Return where the latents of the video at `output` lie until it is written."""
    return output.with_name(f"{output.name}{LATENTS}")


def video_path(latents: Path) -> Path:
    """Return where the video of a latents file was to be written; for a file of another name, an .mp4 beside it."""
    if latents.name.endswith(LATENTS):
        return latents.with_name(latents.name.removesuffix(LATENTS))
    return latents.with_suffix(".mp4")


def check(path: Path, *, force: bool, begins: bool) -> None:
    """Raise `VgenError` when writing the video at `path` would take something away.

    That is the video, its manifest, or, where a run `begins` anew, the latents of one that was not finished. With
    `force` they may be replaced, but never a folder that holds other things than frames. The same goes for a name that
    is too long, of which the latents' is the longest.
    """
    latents = latents_path(path)
    is_unfinished = _exists(latents)
    if path.is_dir() and (path.suffix.lower() != ".png" or any(file.suffix != ".png" for file in path.iterdir())):
        raise VgenError(f"{path} is a folder that vgen did not make.", tip="choose another --output.")
    if force:
        return
    refuse_existing(path, manifest.sidecar(path))
    if begins and is_unfinished:
        raise VgenError(
            f"{latents} exists: a run that was not finished.",
            tip=f"finish it with: vgen decode {latents}, or pass --force to begin again.",
        )


def refuse_existing(*paths: Path) -> None:
    """Raise `VgenError` for the first of files and folders that would be replaced."""
    for path in paths:
        if _exists(path):
            raise VgenError(f"{path} exists already.", tip="choose another --output, or pass --force.")


def prepare_folder(path: Path) -> None:
    """Create the folder that `path` lies in and raise `VgenError` when no file can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise not_written(path, error) from error


def _exists(path: Path) -> bool:
    """Return whether something is there; raise `VgenError` for a name that nothing can have."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise not_written(path, error) from error
    return True


def _distinct(paths: list[Path]) -> list[Path]:
    """Number the second and later of equal names: the same prompt and seed in the same second."""
    seen: dict[Path, int] = {}
    distinct = []
    for path in paths:
        seen[path] = seen.get(path, 0) + 1
        distinct.append(path if seen[path] == 1 else path.with_name(f"{path.stem}-{seen[path]}{path.suffix}"))
    return distinct
