"""The user's video as a model takes it: read, and fitted to a frame rate and a size."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from vgen import video
from vgen.conditioning.images import fit_image
from vgen.errors import UsageError, VgenError
from vgen.video import Frames, Video

# Frame rates this near are the same: containers round them, and 23.976 is written as 24.
SAME_RATE = 0.01


def read(path: Path) -> Video:
    """Return the video at `path`, or the folder of PNGs; raises `UsageError` where there is none."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UsageError(f"There is no video {path}.", tip="check the path.") from error
    return _read(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _read(path: Path, modified: int, size: int) -> Video:
    """The last one is kept, because a plan looks at it before its run does; a file that was modified is read again."""
    try:
        return video.read(path)
    except VgenError as error:
        tip = error.tip or "give a file that ffmpeg reads, or a folder of PNGs."
        raise UsageError(error.message, tip=tip) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"Cannot read the frames in {path}: {error}.", tip="give PNGs that are whole and of one size."
        ) from error


def at_rate(clip: Video, fps: float) -> Frames:
    """Return a clip's frames [F, H, W, 3] at `fps`: left out or repeated, so that it lasts as long and ends the same.

    A folder of PNGs has no rate of its own and is taken at this one.
    """
    if is_same_rate(clip, fps):
        return clip.frames
    count = max(1, round(len(clip.frames) * fps / clip.fps))
    from_end = ((np.arange(count) * clip.fps) / fps).astype(int)
    frames: Frames = clip.frames[np.sort(np.maximum(len(clip.frames) - 1 - from_end, 0))]
    return frames


def is_same_rate(clip: Video, fps: float) -> bool:
    """Return whether a clip is taken frame by frame at `fps`."""
    return clip.fps == 0 or abs(clip.fps / fps - 1) <= SAME_RATE


def fitted(frames: Frames, width: int, height: int) -> Frames:
    """Return frames [F, height, width, 3]: the same where they have this size, else scaled to cover it and cut."""
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack([fit_image(Image.fromarray(frame), width, height) for frame in frames])
