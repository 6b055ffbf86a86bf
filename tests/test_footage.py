"""The user's clips: what ffmpeg reads is read, and what is broken is told, never raised as something else."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from vgen import video
from vgen.editing import footage
from vgen.errors import UsageError
from vgen.runtime import Memory

PICTURE = ["-f", "lavfi", "-i", "testsrc=size=48x32:rate=12:duration=1"]
TONE = ["-f", "lavfi", "-i", "sine=frequency=440:duration=1"]


def ffmpeg(path: Path, *arguments: str) -> Path:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *arguments, str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {
        ".mp4": ffmpeg(folder / "a.mp4", *PICTURE, *TONE, "-movflags", "+faststart"),
        ".mov": ffmpeg(folder / "a.mov", *PICTURE, *TONE),
        ".webm": ffmpeg(folder / "a.webm", *PICTURE, *TONE, "-c:v", "libvpx-vp9", "-cpu-used", "8"),
        ".mkv": ffmpeg(folder / "a.mkv", *PICTURE, *TONE),
        ".gif": ffmpeg(folder / "a.gif", *PICTURE),
    }


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm", ".mkv", ".gif"])
def test_containers_are_read_with_their_sound(clips: dict[str, Path], suffix: str) -> None:
    clip = footage.read(clips[suffix])
    assert clip.frames.shape == (12, 32, 48, 3)
    assert clip.fps == pytest.approx(12, rel=0.01)
    assert clip.notes == ()
    sound = footage.sound(clip, 0.5)
    if suffix == ".gif":
        assert sound is None
    else:
        assert sound is not None
        assert sound.waveform.shape == (1, sound.sampling_rate // 2)
        assert 0.05 < np.abs(sound.waveform).max() < 0.2  # sine is an eighth of full scale


def test_a_part_begins_and_ends_where_asked(clips: dict[str, Path]) -> None:
    whole, part = footage.read(clips[".mp4"]), footage.read(clips[".mp4"], start=0.5, seconds=0.25)
    np.testing.assert_array_equal(part.frames, whole.frames[6:9])
    with pytest.raises(UsageError, match="holds no frames after second 3"):
        footage.read(clips[".mp4"], start=3)


def test_a_varying_rate_becomes_a_constant_one(tmp_path: Path) -> None:
    chosen = "select='lt(n,6)+not(mod(n,3))'"
    clip = footage.read(ffmpeg(tmp_path / "a.mkv", *PICTURE, "-vf", chosen, "-fps_mode", "vfr"))
    assert "varies: its 8 frames are taken as 10" in clip.notes[0]
    assert clip.fps == pytest.approx(12, rel=0.02)
    # Frames 0 to 5, then 6 and 9, of which 6 is shown for three.
    assert [(clip.frames[i] == clip.frames[i + 1]).all() for i in range(9)] == [False] * 6 + [True] * 2 + [False]


def test_what_is_transparent_is_taken_over_black_and_said(tmp_path: Path) -> None:
    colour = ["-f", "lavfi", "-i", "color=red@0.5:size=48x32:rate=12:duration=0.5,format=yuva444p10le"]
    moving = footage.read(ffmpeg(tmp_path / "a.mov", *colour, "-c:v", "prores_ks", "-profile:v", "4444"))
    Image.new("RGBA", (48, 32), (255, 0, 0, 128)).save(tmp_path / "a.png")
    folder = footage.read(tmp_path / "a.png")
    for clip in (moving, folder):
        assert "transparent" in clip.notes[0]
        assert abs(int(clip.frames[0, 0, 0, 0]) - 128) < 3
        assert clip.frames[0, 0, 0, 1:].max() < 3


def test_a_folder_of_pictures_is_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for number in (9, 10, 1):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    Image.new("RGB", (8, 8), (99, 0, 0)).save(tmp_path / "frame20.webp", lossless=True)
    clip = footage.read(tmp_path)
    assert clip.frames[:, 0, 0, 0].tolist() == [1, 9, 10, 99]
    assert clip.fps == 0
    Image.new("RGB", (8, 9)).save(tmp_path / "frame2.png")
    with pytest.raises(UsageError, match="give frames of one size"):
        footage.read(tmp_path)


def test_without_a_picture_there_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    sound = ffmpeg(tmp_path / "a.m4a", *TONE)
    for path, reason in (
        (sound, "has no video stream"),
        (tmp_path / "missing.mp4", "There is no video"),
        (tmp_path / "empty.mp4", "cannot be read as a video"),
        (tmp_path / "text.mp4", "cannot be read as a video"),
        (tmp_path / "folder", "holds no pictures"),
        (tmp_path / "broken", "Cannot read the picture"),
    ):
        with pytest.raises(UsageError, match=reason):
            footage.read(path)


def test_what_does_not_fit_into_memory_is_refused(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vgen.runtime.memory", lambda device: Memory(device=device, total=10**9, free=100_000))
    with pytest.raises(UsageError, match="does not fit into memory"):
        footage.read(clips[".mp4"])


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm", ".mkv", ".gif"])
def test_a_file_that_is_cut_off_is_refused(clips: dict[str, Path], tmp_path: Path, suffix: str) -> None:
    whole, rng = clips[suffix].read_bytes(), random.Random(suffix)
    for share in (0.02, rng.uniform(0.1, 0.4), rng.uniform(0.4, 0.8)):
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UsageError):
            footage.read(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm", ".mkv", ".gif"])
def test_a_file_with_wrong_bytes_is_read_or_refused(clips: dict[str, Path], tmp_path: Path, suffix: str) -> None:
    whole, rng = clips[suffix].read_bytes(), random.Random(suffix)
    refused = 0
    for wrong in (1, 8, 60, len(whole) // 8):
        broken = bytearray(whole)
        for _ in range(wrong):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(broken)
        try:
            clip = footage.read(path)
            assert clip.frames.ndim == 4
        except UsageError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused >= 1, "an eighth of all bytes wrong"


def test_a_wrong_tag_of_the_size_is_no_traceback(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, 31, 33, 3), np.uint8)
    video.save(frames, tmp_path / "a.mp4", fps=8)
    assert footage.read(tmp_path / "a.mp4").size == (33, 31)
    whole = (tmp_path / "a.mp4").read_bytes()
    assert whole.count(b"33x31") == 1
    for wrong in (b"?3x31", b"00x31", b"33331", b"99x99"):
        (tmp_path / "a.mp4").write_bytes(whole.replace(b"33x31", wrong))
        assert footage.read(tmp_path / "a.mp4").size == (34, 32)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_pictures_with_wrong_bytes_are_read_or_refused(tmp_path: Path, suffix: str) -> None:
    path, rng, refused = tmp_path / f"a{suffix}", random.Random(suffix), 0
    Image.effect_noise((24, 16), 60).convert("RGB").save(path)
    whole = path.read_bytes()
    for wrong in (1, 4, 20) * 10:
        broken = bytearray(whole[: rng.choice((len(whole), rng.randrange(len(whole))))])
        for _ in range(min(wrong, len(broken))):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            assert footage.read(tmp_path).frames.ndim == 4
        except UsageError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused >= 1
