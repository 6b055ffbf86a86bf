"""The user's own clip: out of any container, at a constant rate, opaque, with its sound; or a reason why not."""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageOps

from vgen import runtime, video
from vgen.errors import UsageError, VgenError, reason_of
from vgen.video import Frames, Sound

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SHARE_OF_MEMORY = 0.2  # of what is free: besides the clip there are its view, the result and what is measured
STALLED = 60.0  # seconds without a frame after which ffmpeg is given up
UNEVEN = (
    0.5  # of a frame: how far from its place at a constant rate a frame is shown before the rate is called variable
)
ALPHA = re.compile(r"^(yuva|rgba|bgra|argb|abgr|gbrap|ya\d|pal8)")


@dataclass(frozen=True, kw_only=True)
class Footage:
    """A clip that was read: frames uint8 [F, H, W, 3], frames per second (0: not known), and what was changed for it.

    Its sound begins at `start` seconds of the file.
    """

    frames: Frames
    fps: float
    path: Path
    start: float = 0.0
    notes: tuple[str, ...] = ()
    sound_format: tuple[int, int] | None = None
    """(samples per second, channels) of the sound track, where there is one."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.frames.shape[2], self.frames.shape[1]


def read(path: Path, *, start: float = 0.0, seconds: float | None = None) -> Footage:
    """Return the clip at `path`, a file that ffmpeg reads or a folder of pictures, from second `start` on.

    Raises `UsageError` for what is missing, damaged, has no picture or does not fit into memory. A file that is
    damaged half way is refused, too: what is left of it would be edited without a word.
    """
    try:
        if path.is_dir():
            return _pictures(path, start, seconds)
        if not path.is_file():
            raise UsageError(f"There is no video {path}.", tip="check the path.")
        return _file(path, start, seconds)
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {reason_of(error)}.", tip="check the path.") from error


def sound(footage: Footage, seconds: float) -> Sound | None:
    """Return the first `seconds` of a clip's sound, at most two channels; None of a clip without any.

    A track that begins after the picture begins with silence. Raises `VgenError` when it cannot be read.
    """
    if footage.sound_format is None:
        return None
    rate, channels = footage.sound_format
    with tempfile.TemporaryFile() as messages, tempfile.TemporaryFile() as samples:
        command = [
            *_ffmpeg("level+error"),
            "-ss",
            str(footage.start),
            "-i",
            f"file:{footage.path}",
            "-t",
            str(seconds),
        ]
        command += ["-map", "0:a:0", "-vn", "-af", "aresample=async=1:first_pts=0", "-ac", str(channels)]
        command += ["-ar", str(rate), "-f", "f32le", "pipe:1"]
        try:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=samples, stderr=messages, timeout=10 * STALLED
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        samples.seek(0)
        waveform = np.frombuffer(samples.read(), np.dtype("<f4")).astype(np.float32)
        if code or len(waveform) % channels:
            raise VgenError(f"The sound of {footage.path} cannot be read: {_reason(messages)}")
    return Sound(waveform=waveform.reshape(-1, channels).T, sampling_rate=rate) if len(waveform) else None


def _file(path: Path, start: float, seconds: float | None) -> Footage:
    facts = _probe(path)
    notes = []
    decoder = ["-c:v", "libvpx-vp9"] if facts.hidden_alpha else []
    command = [*_ffmpeg("level+info"), "-xerror", *decoder, "-ss", f"{start:f}", "-i", f"file:{path}"]
    command += [] if seconds is None else ["-t", f"{seconds:f}"]
    has_alpha = facts.hidden_alpha or bool(ALPHA.match(facts.pixels))
    command += [
        "-map",
        f"0:{facts.stream}",
        "-vf",
        "scale=flags=accurate_rnd+full_chroma_int+full_chroma_inp,showinfo",
    ]
    command += ["-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "pam"]
    command += ["-pix_fmt", "rgba" if has_alpha else "rgb24", "pipe:1"]
    with tempfile.TemporaryFile() as messages:
        pictures, is_done = _decode(command, messages, path)
        times = [float(time) for time in re.findall(rb"pts_time:\s*(-?[\d.]+)", _content(messages))]
        if not pictures and (is_done or b"Output file is empty" in _content(messages)):
            raise UsageError(
                f"{path} holds no frames" + (f" after second {start:g}." if start else "."),
                tip="choose a lower --start." if start else "check the file.",
            )
        # What is cut off is only logged.
        if not is_done or re.search(rb"\[(error|fatal)\]", _content(messages)):
            raise UsageError(
                f"{path} is damaged: {_reason(messages)}",
                tip="convert what is left of it with ffmpeg, or take a part that is whole with --start and --seconds.",
            )
    if any(picture.shape != pictures[0].shape for picture in pictures):
        raise UsageError(f"The frames of {path} change their size.", tip="convert it to one size with ffmpeg.")
    frames = np.stack(pictures)
    pictures.clear()
    if has_alpha:
        frames, is_transparent = _opaque(frames)
        if is_transparent:
            notes.append("The clip is transparent in places: it is taken over black, and the result is opaque.")
    fps = facts.fps
    if len(times) == len(frames) > 1:
        shown, fps, is_variable = constant_rate(np.array(times), facts.fps)
        if is_variable:
            notes.append(
                f"The clip's frame rate varies: its {len(frames)} frames are taken as {len(shown)} at {fps:g} per "
                "second, as they are shown."
            )
            _check_memory(path, frames[0].nbytes * len(shown))
            frames = frames[shown]
    # A line that was padded for the encoder, and no more: the tag may be as damaged as the rest.
    if size := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", video.read_tags(path).get(video.SIZE_TAG, "")):
        frames = frames[:, : int(size[2]), : int(size[1])]
    return Footage(frames=frames, fps=fps, path=path, start=start, notes=tuple(notes), sound_format=facts.sound_format)


def constant_rate(times: np.ndarray, told: float) -> tuple[np.ndarray, float, bool]:
    """Return which frame is shown at each tick of a constant rate, the rate, and whether the clip's was another.

    `times` [F] are when frames begin to be shown, in seconds, and `told` is what the container says the rate is.
    """
    gaps = np.diff(times)
    mean, usual = float(gaps.mean()), float(np.median(gaps))
    if mean > 0 and np.abs(times - times[0] - mean * np.arange(len(times))).max() <= UNEVEN * mean:
        fps = told if told and abs(told * mean - 1) < 1e-3 else round(1 / mean, 3)
        return np.arange(len(times)), fps, False
    positive = gaps[gaps > 0]
    if len(positive) == 0:
        return np.arange(len(times)), told, False
    usual = usual if usual > 0 else float(np.median(positive))
    ticks = np.arange(times[0], times[-1] + usual / 2, usual)
    shown = np.searchsorted(times, ticks + usual / 4, side="right") - 1
    return shown, round(1 / usual, 3), True


@dataclass(frozen=True, kw_only=True)
class _Facts:
    stream: int
    fps: float
    pixels: str
    hidden_alpha: bool
    sound_format: tuple[int, int] | None


def _probe(path: Path) -> _Facts:
    """Return what ffmpeg prints about a file."""
    try:
        done = subprocess.run(
            [*_ffmpeg("info"), "-i", f"file:{path}"], stdin=subprocess.DEVNULL, capture_output=True, timeout=STALLED
        )
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"{path} cannot be read: ffmpeg does not come to an end.", tip="check the file.") from error
    told = done.stderr.decode(errors="replace")
    streams = re.findall(r"Stream #0:(\d+)\S*: (Video|Audio): (.*)", told)
    # The cover of a song is a video stream, too.
    pictures = [
        (int(number), text) for number, kind, text in streams if kind == "Video" and "attached pic" not in text
    ]
    if not pictures:
        if streams:
            raise UsageError(f"{path} has no video stream.", tip="give a file with a picture.")
        told = told.replace("At least one output file must be specified", "it holds no streams.")
        reason = told.strip().splitlines()[-1] if told.strip() else "ffmpeg says nothing of it."
        raise UsageError(f"{path} cannot be read as a video: {reason}", tip="give an mp4, mov, webm, mkv or gif.")
    number, text = pictures[0]
    rate = re.search(r"([\d.]+)(k?) fps", text)
    pixels = re.search(r", (\w+)(?:\([^)]*\))?, \d+x\d+", text)
    hearing = [text for _, kind, text in streams if kind == "Audio"]
    heard = re.search(r"(\d+) Hz, (\w+)", hearing[0]) if hearing else None
    return _Facts(
        stream=number,
        fps=float(rate[1]) * (1000 if rate[2] else 1) if rate else 0.0,
        pixels=pixels[1] if pixels else "",
        hidden_alpha="vp9" in text and "alpha_mode" in told,
        sound_format=(int(heard[1]), 1 if heard[2] == "mono" else 2) if heard else None,
    )


def _decode(command: list[str], messages: IO[bytes], path: Path) -> tuple[list[np.ndarray], bool]:
    """Return the pictures [H, W, 3 or 4] that ffmpeg gives, and whether it came to a good end."""
    pictures: list[np.ndarray] = []
    with _running(command, messages) as (process, heartbeat):
        assert process.stdout is not None
        while (picture := _pam(process.stdout)) is not None:
            pictures.append(picture)
            heartbeat()
            _check_memory(path, (len(pictures) + 1) * picture.nbytes)
        code = process.wait()
    return pictures, code == 0


@contextmanager
def _running(command: list[str], messages: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], _Heartbeat]]:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages, bufsize=1 << 20
    )
    heartbeat = _Heartbeat(process)
    try:
        yield process, heartbeat
    finally:
        heartbeat.stop()
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


class _Heartbeat:
    """Ends a process that is silent for `STALLED` seconds; to be called when it gives something."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._timer = self._begin()

    def __call__(self) -> None:
        self._timer.cancel()
        self._timer = self._begin()

    def stop(self) -> None:
        """Let it be."""
        self._timer.cancel()

    def _begin(self) -> threading.Timer:
        timer = threading.Timer(STALLED, self._process.kill)
        timer.daemon = True
        timer.start()
        return timer


def _pam(stream: IO[bytes]) -> np.ndarray | None:
    """Return the next picture of a stream of PAM files; None at its end, or where it breaks off."""
    header = {}
    while (line := stream.readline()) and line != b"ENDHDR\n":
        name, _, value = line.partition(b" ")
        header[name] = value
    if not line:
        return None
    height, width, depth = (int(header[name]) for name in (b"HEIGHT", b"WIDTH", b"DEPTH"))
    content = stream.read(height * width * depth)
    if len(content) < height * width * depth:
        return None
    return np.frombuffer(content, np.uint8).reshape(height, width, depth)


def _pictures(folder: Path, start: float, seconds: float | None) -> Footage:
    if start or seconds is not None:
        raise UsageError("A folder of pictures has no seconds.", tip="leave out --start and --seconds.")
    files = sorted((file for file in folder.iterdir() if file.suffix.lower() in IMAGES), key=_numbered)
    if not files:
        raise UsageError(f"The folder {folder} holds no pictures.", tip="give a video file or a folder of frames.")
    frames: list[Frames] = []
    is_transparent = False
    for file in files:
        try:
            with Image.open(file) as picture:
                pixels = np.asarray(ImageOps.exif_transpose(picture).convert("RGBA"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(
                f"Cannot read the picture {file}: {error}.", tip="give pictures that are whole."
            ) from error
        if frames and pixels.shape[:2] != frames[0].shape[:2]:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (pixels.shape, frames[0].shape)]
            raise UsageError(f"{file} is {sizes[0]} and {files[0].name} {sizes[1]}.", tip="give frames of one size.")
        opaque, found = _opaque(pixels)
        is_transparent = is_transparent or found
        frames.append(opaque)
        _check_memory(folder, (len(frames) + 1) * opaque.nbytes)
    note = "The pictures are transparent in places: they are taken over black, and the result is opaque."
    return Footage(frames=np.stack(frames), fps=0.0, path=folder, notes=(note,) if is_transparent else ())


def _numbered(file: Path) -> list[tuple[int, str]]:
    """Sort frame10 after frame9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name) if part]


def _opaque(frames: np.ndarray) -> tuple[Frames, bool]:
    """Return frames [..., 4] over black as [..., 3], and whether any of it was transparent."""
    alpha = frames[..., 3:]
    if alpha.min() == 255:
        return frames[..., :3], False
    return (frames[..., :3].astype(np.uint16) * alpha // 255).astype(np.uint8), True


def _check_memory(path: Path, num_bytes: int) -> None:
    if num_bytes > SHARE_OF_MEMORY * runtime.memory("cpu").free:
        raise UsageError(
            f"{path} does not fit into memory: its frames take more than {num_bytes / 1e9:.1f} GB.",
            tip="edit a part of it with --start and --seconds, or a smaller version.",
        )


def _ffmpeg(loglevel: str) -> list[str]:
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-nostats", "-loglevel", loglevel]


def _content(messages: IO[bytes]) -> bytes:
    messages.seek(0)
    return messages.read()


def _reason(messages: IO[bytes]) -> str:
    """Return the first of ffmpeg's messages that tells of an error."""
    lines = _content(messages).decode(errors="replace").splitlines()
    wrong = [line for line in lines if "[error]" in line or "[fatal]" in line]
    found = (wrong or lines or ["ffmpeg gave up."])[0].strip()
    return re.sub(r"^(\[[^\]]*\] )+", "", found)[:200]
