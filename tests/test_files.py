from pathlib import Path

import pytest

from vgen.errors import VgenError
from vgen.files import atomic, write_text


def test_file_appears_when_the_block_is_done(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic(path) as part:
        part.write_text("new")
        assert not path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_early_end_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic(path) as part:
        part.write_text("half")
        raise error
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "old"}


def test_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    for name in ("old", "new"):
        with atomic(path) as part:
            part.mkdir()
            (part / name).touch()
    assert [p.name for p in path.iterdir()] == ["new"]


def test_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.doc").touch()
    with pytest.raises(VgenError, match=r"Could not write .*folder: Is a directory"):
        write_text(tmp_path / "folder", "x")
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "thesis.doc"]


def test_folder_takes_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "frames.png").touch()
    with atomic(tmp_path / "frames.png") as part:
        part.mkdir()
    assert (tmp_path / "frames.png").is_dir()


def test_full_disk_is_said(tmp_path: Path) -> None:
    says = r"Could not write .*a\.txt: No space left on device\.\nTip: free some space"
    with pytest.raises(VgenError, match=says), atomic(tmp_path / "a.txt"), Path("/dev/full").open("w") as full:
        full.write("x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VgenError, match=r"Could not write .*file/a\.txt: Not a directory"):
        write_text(tmp_path / "file" / "a.txt", "x")
