"""Videos are written with the real ffmpeg and judged by what a reader that knows nothing but the file gets back."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vgen import video
from vgen.errors import UsageError, VgenError

COLOURS = np.array(
    [
        [220, 40, 40],
        [40, 180, 60],
        [40, 70, 220],
        [250, 220, 40],
        [30, 200, 210],
        [180, 60, 200],
        [128, 128, 128],
        [240, 140, 40],
    ],
    np.uint8,
)


def patches() -> video.Frames:
    """Nine frames [9, 64, 128, 3] of eight flat 32-pixel squares."""
    picture = COLOURS.reshape(2, 4, 3).repeat(32, axis=0).repeat(32, axis=1)
    return np.stack([picture] * 9)


def ramp(height: int, width: int, num_frames: int = 5) -> video.Frames:
    """Frames of smooth gradients, so that a shift or a rescale by one pixel shows at the borders."""
    y, x = np.linspace(30, 220, height), np.linspace(30, 220, width)
    picture = np.stack([y[:, None] + 0 * x, x + 0 * y[:, None], np.full((height, width), 128.0)], axis=-1)
    return np.stack([picture.astype(np.uint8)] * num_frames)


def decode_plainly(path: Path, height: int, width: int) -> video.Frames:
    """Decode with ffmpeg and no options at all: what any player does with the file's tags."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    pixels = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3)


def described(path: Path) -> str:
    """Return ffmpeg's own line about the video stream."""
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", path], capture_output=True)
    (line,) = re.findall(r"Stream #0.*Video:.*", done.stderr.decode())
    return str(line)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_colours_come_back_from_the_tags_alone(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"patches{suffix}"
    video.save(patches(), path, fps=8)
    middles = decode_plainly(path, 64, 128)[:, 16::32, 16::32].reshape(-1, 8, 3).astype(int)
    # 8-bit limited-range YCbCr alone rounds by up to 2 levels. BT.601 read as BT.709 is off by 10 to 40.
    assert np.abs(middles - COLOURS).max() <= 3


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_video_is_tagged_bt709_limited(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"patches{suffix}"
    video.save(patches(), path, fps=8)
    # One name where matrix, primaries and transfer are the same; ffmpeg prints "bt709/unknown/unknown" otherwise.
    assert "yuv420p(tv, bt709, progressive)" in described(path)


def test_mp4_is_h264_that_starts_before_it_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "patches.mp4"
    video.save(patches(), path, fps=8)
    content = path.read_bytes()
    assert "h264" in described(path)
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png"])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (65, 96), (64, 97), (33, 51), (1, 1)])
def test_size_and_number_of_frames_come_back(tmp_path: Path, suffix: str, height: int, width: int) -> None:
    path = tmp_path / f"ramp{suffix}"
    frames = ramp(height, width)
    video.save(frames, path, fps=8)
    back = video.read(path)
    assert back.frames.shape == frames.shape
    # GIF has 256 colours for all frames together; the others are within the codec's noise.
    assert np.abs(back.frames.astype(int) - frames).mean() < (4 if suffix == ".gif" else 2)
    if suffix != ".png":
        # GIF counts in hundredths of a second, so 1/8 s is 12 or 13 of them.
        assert back.fps == pytest.approx(8, rel=0.05 if suffix == ".gif" else 0)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(height=st.integers(1, 70), width=st.integers(1, 70), fps=st.sampled_from([1, 8, 12.5, 24, 29.97]))
def test_any_size_comes_back(tmp_path: Path, height: int, width: int, fps: float) -> None:
    path = tmp_path / "any.mp4"
    video.save(ramp(height, width, 2), path, fps=fps)
    back = video.read(path)
    assert back.frames.shape == (2, height, width, 3)
    assert back.fps == pytest.approx(fps, abs=0.01)


def test_png_is_lossless(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 15, 17, 3), np.uint8)
    video.save(frames, tmp_path / "noise.png", fps=8)
    assert sorted(p.name for p in (tmp_path / "noise.png").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    np.testing.assert_array_equal(video.read(tmp_path / "noise.png").frames, frames)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=300) | st.text(alphabet="=;#\\\n\r\t \"'[]{}é🦊", max_size=60))
def test_manifest_survives(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"m{suffix}"
    manifest = {"prompt": text, "nested": [1, 2.5, None, {"a": text}]}
    video.save(patches()[:1], path, fps=8, manifest=manifest)
    assert json.loads(video.read_tags(path)[video.MANIFEST_TAG]) == manifest


def test_long_manifest_survives(tmp_path: Path) -> None:
    manifest = {"prompt": "a \"quoted\" = 'thing'; # \\ \n 🦊 " * 10_000}
    video.save(patches()[:1], tmp_path / "long.mp4", fps=8, manifest=manifest)
    assert json.loads(video.read_tags(tmp_path / "long.mp4")[video.MANIFEST_TAG]) == manifest


@pytest.mark.parametrize("name", ["-v.mp4", "a:b.mp4", "with space.mp4", "100%d.mp4", "é🦊.mp4"])
def test_strange_names_are_just_names(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    video.save(patches(), Path(name), fps=8)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert len(video.read(Path(name)).frames) == 9


def test_unknown_suffix_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"movie\.avi.*\n.*\.mp4"):
        video.save(patches(), tmp_path / "movie.avi", fps=8)


def test_missing_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(VgenError, match=r"Could not write .*no/such/v\.mp4.*No such file"):
        video.save(patches(), tmp_path / "no" / "such" / "v.mp4", fps=8)


SAVE_NOISE = """
import sys, numpy as np
from pathlib import Path
from vgen import video
from vgen.errors import VgenError
try:
    video.save(np.random.default_rng(0).integers(0, 256, (9, 128, 128, 3), np.uint8), Path(sys.argv[1]), fps=8)
except VgenError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png"])
def test_file_that_cannot_grow_is_one_clear_error_and_no_half_file(tmp_path: Path, suffix: str) -> None:
    """A limit on file size stops the writer half way, as a full disk does."""
    limit = 10_000

    def no_big_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    path = tmp_path / f"noise{suffix}"
    path.parent.joinpath("kept.mp4").write_bytes(b"kept")
    done = subprocess.run(
        [sys.executable, "-c", SAVE_NOISE, path], capture_output=True, text=True, preexec_fn=no_big_files
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert f"{path}" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["kept.mp4"]


def test_full_disk_is_named(tmp_path: Path) -> None:
    """What ffmpeg says and exits with when the device is full, as /dev/full is from the first byte."""
    from vgen.files import not_written

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-f", "lavfi", "-i", "color=s=64x64:d=1"]
    done = subprocess.run([*command, "-c:v", "libx264", "-f", "mp4", "/dev/full"], capture_output=True)
    error = video._encoding_failed(tmp_path / "v.mp4", done)
    assert "No space left on device" in str(error)
    assert error.tip == not_written(tmp_path, OSError(28, os.strerror(28))).tip


def test_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(b"old")
    monkeypatch.setitem(video.ENCODERS, ".mp4", ["-c:v", "no_such_codec", "-f", "mp4"])
    with pytest.raises(VgenError, match="no_such_codec"):
        video.save(patches(), path, fps=8)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"v.mp4": b"old"}


def test_reading_what_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(VgenError, match="no video"):
        video.read(tmp_path / "missing.mp4")
    (tmp_path / "text.mp4").write_text("this is text")
    with pytest.raises(VgenError, match="cannot be read as a video"):
        video.read(tmp_path / "text.mp4")
    with pytest.raises(VgenError, match=r"no \.png"):
        video.read(tmp_path)
