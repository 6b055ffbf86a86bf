"""Frames to file and back: right colours, tagged as such, written all or nothing, with the run's manifest inside.

Video is stored as limited-range BT.709 and says so in its tags, so that every player shows the frames' own colours.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vgen.errors import UsageError, VgenError
from vgen.files import atomic, not_written

Frames = NDArray[np.uint8]
Finished = subprocess.CompletedProcess[bytes]

# RGB to YCbCr by the matrix that the tags name. `setparams` is what makes the encoders write primaries and transfer.
BT709 = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int+full_chroma_inp,format=yuv420p,"
    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)
# One palette for all frames, so that still parts stay still; no dithering of what the palette already holds.
PALETTE = "split[a][b];[a]palettegen=stats_mode=full[p];[b][p]paletteuse=dither=sierra2_4a"

ENCODERS: dict[str, list[str]] = {
    ".mp4": ["-vf", BT709, "-c:v", "libx264", "-crf", "16", "-movflags", "+faststart+use_metadata_tags", "-f", "mp4"],
    ".webm": ["-vf", BT709, "-c:v", "libvpx-vp9", "-crf", "20", "-b:v", "0", "-cpu-used", "3", "-f", "webm"],
    ".gif": ["-filter_complex", PALETTE, "-f", "gif"],
}
SUFFIXES = (*ENCODERS, ".png")
# Formats that have a sound track. Opus takes few sampling rates: ffmpeg converts to the nearest.
SOUND_ENCODERS: dict[str, list[str]] = {
    ".mp4": ["-c:a", "aac", "-b:a", "192k"],
    ".webm": ["-c:a", "libopus", "-b:a", "128k"],
}

MANIFEST_TAG = "vgen"
SIZE_TAG = "vgen_size"


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A sound track in memory: `waveform` [channels, samples] float32 from -1 to 1, samples per second."""

    waveform: NDArray[np.float32]
    sampling_rate: int


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video in memory: `frames` [F, H, W, 3] uint8, frames per second, and the container's text tags."""

    frames: Frames
    fps: float
    tags: dict[str, str]


def encoders() -> list[str]:
    """Return the names of ffmpeg's encoders that videos and sound are written with."""
    settings = [*ENCODERS.values(), *SOUND_ENCODERS.values()]
    return [words[words.index(flag) + 1] for words in settings for flag in ("-c:v", "-c:a") if flag in words]


def save(
    frames: Frames, path: Path, *, fps: float, manifest: Mapping[str, Any] | None = None, sound: Sound | None = None
) -> None:
    """Write `frames` [F, H, W, 3] uint8 to `path` as its suffix says; .png makes a folder, one file per frame.

    The manifest goes into the tags of .mp4 and .webm, and a sound into a track of theirs, AAC and Opus; .gif and .png
    have no place for either. H.264 with 4:2:0 chroma
    stores even sizes only: an odd side is padded by repeating its last line, never rescaled, and `read` takes the line
    off again. Raises `UsageError` for another suffix and `VgenError` when writing fails, which leaves nothing behind.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f'"{path.name}" is not a video format.', tip=f"end the name in one of {', '.join(SUFFIXES)}.")
    if suffix == ".png":
        _save_pngs(frames, path)
        return
    height, width = frames.shape[1:3]
    tags = {} if manifest is None else {MANIFEST_TAG: json.dumps(manifest)}
    if suffix == ".mp4" and (height % 2 or width % 2):
        tags[SIZE_TAG] = f"{width}x{height}"
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        height, width = frames.shape[1:3]
    with tempfile.TemporaryDirectory() as folder, atomic(path) as part:
        metadata = Path(folder, "tags")
        metadata.write_text(_ffmetadata(tags), encoding="utf-8")
        raw = ["-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{width}x{height}", "-framerate", str(fps)]
        inputs = [*raw, "-i", "pipe:0", "-f", "ffmetadata", "-i", str(metadata)]
        if sound is not None and suffix in SOUND_ENCODERS:
            samples = Path(folder, "sound")
            samples.write_bytes(np.ascontiguousarray(sound.waveform.T, np.dtype("<f4")).tobytes())
            rate, channels = str(sound.sampling_rate), str(len(sound.waveform))
            inputs += ["-f", "f32le", "-ar", rate, "-ac", channels, "-i", str(samples)]
            inputs += ["-map", "0:v", "-map", "2:a", *SOUND_ENCODERS[suffix]]
        inputs += ["-map_metadata", "1"]
        pixels = np.ascontiguousarray(frames).reshape(-1).data
        done = _ffmpeg("-y", *inputs, *ENCODERS[suffix], _url(part), stdin=pixels)
        if done.returncode:
            raise _encoding_failed(path, done)


def read(path: Path) -> Video:
    """Return a video file, or a folder of PNGs (whose frame rate is not known and comes back as 0).

    Colours are converted as the file's tags say, and every stored frame comes back once. The frame rate is what ffmpeg
    prints, with two decimals. Raises `VgenError` when there is no such file or ffmpeg cannot read it.
    """
    if path.is_dir():
        return Video(frames=_read_pngs(path), fps=0.0, tags={})
    tags = read_tags(path)
    # PPM pictures carry their own size, so nothing has to be known beforehand.
    pictures = ["-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1"]
    sharp = ["-vf", "scale=flags=accurate_rnd+full_chroma_int+full_chroma_inp"]
    done = _ffmpeg("-i", _url(path), *sharp, *pictures, loglevel="info")
    header = re.match(rb"P6\n(\d+) (\d+)\n255\n", done.stdout)
    if done.returncode or header is None:
        has_no_picture = b"Stream #0" in done.stderr and b"Video:" not in done.stderr
        reason = "it has no picture." if has_no_picture else _last_line(done)
        raise VgenError(f"{path} cannot be read as a video: {reason}")
    width, height = int(header[1]), int(header[2])
    pictures_FN = np.frombuffer(done.stdout, np.uint8).reshape(-1, header.end() + height * width * 3)
    frames = pictures_FN[:, header.end() :].reshape(-1, height, width, 3)
    if SIZE_TAG in tags:
        width, height = (int(side) for side in tags[SIZE_TAG].split("x"))
    rate = re.search(rb"Stream #0.*Video:.*?([\d.]+) fps", done.stderr)
    return Video(frames=frames[:, :height, :width], fps=float(rate[1]) if rate else 0.0, tags=tags)


def read_tags(path: Path) -> dict[str, str]:
    """Return the container's text tags. Raises `VgenError` when there is no such file or ffmpeg cannot read it."""
    if not path.is_file():
        raise VgenError(f"There is no video {path}.", tip="check the path.")
    done = _ffmpeg("-i", _url(path), "-f", "ffmetadata", "pipe:1")
    if done.returncode:
        raise VgenError(f"{path} cannot be read as a video: {_last_line(done)}")
    return _parse_ffmetadata(done.stdout.decode("utf-8", errors="replace"))


def _save_pngs(frames: Frames, path: Path) -> None:
    with atomic(path) as part:
        part.mkdir()
        for index, frame in enumerate(frames):
            Image.fromarray(frame).save(part / f"{index:05d}.png")


def _read_pngs(folder: Path) -> Frames:
    files = sorted(folder.glob("*.png"))
    if not files:
        raise VgenError(f"The folder {folder} holds no .png files.", tip="give a video file or a folder of frames.")
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def _ffmpeg(*arguments: str, stdin: memoryview | None = None, loglevel: str = "error") -> Finished:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-loglevel", loglevel, *arguments]
    if stdin is None:
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    return subprocess.run(command, capture_output=True, input=stdin)


def _url(path: Path) -> str:
    """A path as ffmpeg takes it: a colon in a file's name is no protocol, a leading hyphen no option."""
    return f"file:{path}"


def _encoding_failed(path: Path, done: Finished) -> VgenError:
    # ffmpeg exits with the negative error number of what failed, as a byte.
    number = 256 - done.returncode
    stderr = done.stderr.decode(errors="replace")
    if 0 < number < 134 and os.strerror(number) in stderr:
        return not_written(path, OSError(number, os.strerror(number)))
    return VgenError(f"ffmpeg could not write {path} (exit status {done.returncode}):\n{stderr.strip()}")


def _last_line(done: Finished) -> str:
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "ffmpeg found no picture in it."


def _ffmetadata(tags: Mapping[str, str]) -> str:
    """Return `tags` in ffmpeg's own text format, which takes values too long for a command line."""
    lines = [f"{key}={_SPECIAL.sub(_ESCAPED, value)}" for key, value in tags.items()]
    return "\n".join([";FFMETADATA1", *lines, ""])


def _parse_ffmetadata(text: str) -> dict[str, str]:
    # Matroska writes its keys in capitals.
    return {_unescape(key).lower(): _unescape(value) for key, value in _TAG.findall(text)}


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


_SPECIAL = re.compile(r"([=;#\\\n])")
_ESCAPED = r"\\\1"
_TAG = re.compile(r"^(?![;\[])((?:\\.|[^=\\\n])+)=((?:\\.|[^\\\n])*)$", re.MULTILINE | re.DOTALL)
