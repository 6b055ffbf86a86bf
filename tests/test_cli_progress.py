from types import SimpleNamespace

import pytest
from rich.console import Console

from vgen.cli import progress


def test_without_a_terminal_there_is_a_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown(num_jobs=1) as watch:
        watch.on_stage("load")
        for step in range(1, 4):
            watch.on_step(step, 3)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "Loading the model ...\n")


def test_in_a_terminal_the_steps_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(stderr=stderr, force_terminal=True, _environ={"TERM": "xterm"})
    )
    with progress.shown(num_jobs=2) as watch:
        watch.on_job(None)  # type: ignore[arg-type]
        watch.on_stage("denoise")
        watch.on_step(3, 25)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Denoising" in captured.err
    assert "3/25" in captured.err
    assert "0/2" in captured.err


def test_without_a_terminal_many_jobs_are_counted_and_estimated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 160.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.shown(num_jobs=11) as watch:
        for name in ("a.mp4", "b.mp4"):
            watch.on_job(SimpleNamespace(output=name))  # type: ignore[arg-type]
    assert capsys.readouterr().err == "a.mp4 (1/11):\nb.mp4 (2/11, about 10 min left):\n"


@pytest.mark.parametrize(("seconds", "said"), [(89, "89 s"), (90, "2 min"), (5399, "90 min"), (9000, "2.5 h")])
def test_times_are_told_in_their_unit(seconds: float, said: str) -> None:
    assert progress.duration(seconds) == said
