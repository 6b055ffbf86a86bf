from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from vgen import batch, outputs, video
from vgen.errors import UsageError, VgenError
from vgen.request import GenerateRequest

WHEN = datetime(2026, 1, 2, 3, 4, 5)


@pytest.fixture
def line(tiny_checkpoint: Path) -> batch.PlannedLine:
    request = GenerateRequest(prompt="A red ball!", model=str(tiny_checkpoint), seed=7)
    (planned,), _ = batch.plan_lines([batch.PromptLine(number=None, request=request)], [])
    return planned


def test_formats_are_those_that_video_writes() -> None:
    assert set(outputs.SUFFIXES) == set(video.SUFFIXES)


def test_default_name_tells_prompt_seed_and_time(line: batch.PlannedLine) -> None:
    assert outputs.choose(None, [line], WHEN) == [Path("outputs/a-red-ball-7-20260102-030405.mp4")]
    assert outputs.choose(Path("clips"), [line], WHEN) == [Path("clips/a-red-ball-7-20260102-030405.mp4")]


def test_equal_default_names_are_told_apart(line: batch.PlannedLine) -> None:
    names = [path.name for path in outputs.choose(None, [line, line], WHEN)]
    assert names == ["a-red-ball-7-20260102-030405.mp4", "a-red-ball-7-20260102-030405-2.mp4"]


def test_file_name_takes_the_label(line: batch.PlannedLine) -> None:
    lines = [replace(line, label="1"), replace(line, label="3-2")]
    assert outputs.choose(Path("a/b.gif"), lines, WHEN) == [Path("a/b-1.gif"), Path("a/b-3-2.gif")]
    assert outputs.choose(Path("a/b.gif"), [line], WHEN) == [Path("a/b.gif")]


def test_existing_folder_with_a_dot_is_a_folder(tmp_path: Path, line: batch.PlannedLine) -> None:
    (tmp_path / "v1.0").mkdir()
    (path,) = outputs.choose(tmp_path / "v1.0", [line], WHEN)
    assert path.parent == tmp_path / "v1.0"


def test_unknown_suffix_is_a_usage_error(line: batch.PlannedLine) -> None:
    with pytest.raises(UsageError, match=r'ends in "\.mpg".*\n.*\.mp4'):
        outputs.choose(Path("clip.mpg"), [line], WHEN)


def test_latents_name_leads_back_to_the_video() -> None:
    assert outputs.video_path(outputs.latents_path(Path("a/b.gif"))) == Path("a/b.gif")
    assert outputs.video_path(Path("a/renamed.safetensors")) == Path("a/renamed.mp4")


@pytest.mark.parametrize("existing", ["clip.mp4", "clip.mp4.json", "clip.mp4.latents.safetensors"])
def test_nothing_is_replaced_without_force(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).touch()
    with pytest.raises(VgenError, match=f"{existing} exists"):
        outputs.check(tmp_path / "clip.mp4", force=False, begins=True)
    outputs.check(tmp_path / "clip.mp4", force=True, begins=True)


def test_decoding_may_have_its_latents_beside_it(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4.latents.safetensors").touch()
    outputs.check(tmp_path / "clip.mp4", force=False, begins=False)


def test_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    frames = tmp_path / "frames.png"
    frames.mkdir()
    (frames / "00000.png").touch()
    outputs.check(frames, force=True, begins=True)
    (frames / "thesis.doc").touch()
    with pytest.raises(VgenError, match="did not make"):
        outputs.check(frames, force=True, begins=True)


@pytest.mark.parametrize("length", [300, 240])
def test_name_that_is_too_long_is_known_before_the_run(tmp_path: Path, length: int) -> None:
    """With 240 letters the video can be written, but not the latents before it."""
    with pytest.raises(VgenError, match=r"File name too long.*\n.*a shorter name"):
        outputs.check(tmp_path / f"{'x' * length}.mp4", force=True, begins=True)
    with pytest.raises(VgenError, match="File name too long"):
        outputs.is_folder(tmp_path / f"{'x' * 300}.txt")


def test_a_folder_is_not_named_as_a_video_is(tmp_path: Path) -> None:
    outputs.check_folder(tmp_path / "my.score")
    with pytest.raises(UsageError, match=r"x\.mp4 is to be a folder"):
        outputs.check_folder(tmp_path / "x.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is to be a folder"):
        outputs.check_folder(tmp_path / "file")


def test_folder_is_made_or_refused(tmp_path: Path) -> None:
    outputs.prepare_folder(tmp_path / "new" / "deep" / "clip.mp4")
    assert list((tmp_path / "new" / "deep").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(VgenError, match=r"Could not write .*clip.mp4"):
        outputs.prepare_folder(tmp_path / "file" / "clip.mp4")
