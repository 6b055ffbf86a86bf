"""`vgen eval` as a whole, with a tiny checkpoint of the real classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vgen import cli, video
from vgen.conditioning import given
from vgen.pipelines.evaluate import known_frames, scores
from vgen.pipelines.evaluate.trials import Evaluation
from vgen.toyland.prompts import ATTRIBUTES, held_out, truth


class Said(dict[str, str]):
    """Readings as the score takes them."""


def test_scores_count_what_is_read_and_right() -> None:
    truths = [truth(prompt.clip) for prompt in held_out()[:3]]
    readings = [Said(told) for told in truths]
    readings[1]["colour"] = "none of them"
    found = scores.score(readings, truths)  # type: ignore[arg-type]
    assert found == dict.fromkeys(ATTRIBUTES, 1.0) | {"colour": 0.6667, "joint": 0.6667}
    pairs = [(one, two) for one in truths for two in truths if one is not two]
    shuffled = sum(one["camera"] == two["camera"] for one, two in pairs) / len(pairs)
    assert scores.floor(readings, truths)["camera"] == pytest.approx(shuffled, abs=1e-4)  # type: ignore[arg-type]


def test_eval_makes_reads_reports_and_goes_on(tiny_expanded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "score"
    command = ["eval", "--model", str(tiny_expanded), "-n", "2", "--steps", "1", "-o", str(folder), "--device", "cpu"]
    result = CliRunner().invoke(cli.app, [*command, "--format", "json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    for row in (report, report["ceiling"], report["floor"]):
        assert all(0 <= row[name] <= 1 for name in (*ATTRIBUTES, "joint"))
    assert report["flicker"] > 0 and report["ceiling"]["flicker"] > 0
    assert report["seeds"] == [0, 1] and report["newly_made"] == 4
    assert json.loads((folder / "report.json").read_text()) == report
    assert [one["truth"] for one in report["videos"]] == [truth(prompt.clip) for prompt in held_out()[:2]]
    assert video.read(folder / "made" / "001.mp4").frames.shape == (17, 128, 128, 3)
    assert Image.open(folder / "sheet.png").size == (2 * 5 * 128, 2 * (128 + 14))

    (folder / "made" / "001.mp4").unlink()
    again = CliRunner().invoke(cli.app, command)
    assert again.exit_code == 0, again.output
    assert json.loads((folder / "report.json").read_text())["newly_made"] == 1
    assert [line.split()[0] for line in again.stdout.splitlines()[1:4]] == ["model", "ceiling", "floor"]

    other = CliRunner().invoke(cli.app, [*command, "--seed", "5"])
    assert other.exit_code == 1 and "other settings" in other.stderr


def test_wrong_numbers_of_prompts_are_refused() -> None:
    for number in ("1", "261"):
        result = CliRunner().invoke(cli.app, ["eval", "-n", number])
        assert result.exit_code == 2 and "from 2 to 260" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["known-frame"], 'There is no task "known-frame". Did you mean "known-frames"?'),
        (["--only", "image"], "The task generate has no parts"),
        (["known-frames", "--only", "regions"], 'There is no use of known frames "regions". Did you mean "region"?'),
    ],
)
def test_what_is_no_task_or_part_is_refused(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(cli.app, ["eval", *arguments])
    assert result.exit_code == 2 and says in result.stderr


def test_known_frames_are_scored_by_both_ways(tiny_expanded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "score"
    command = ["eval", "known-frames", "--model", str(tiny_expanded), "-n", "2", "--steps", "1", "-o", str(folder)]
    command += ["--device", "cpu", "--only", "interpolation", "--only", "region"]
    result = CliRunner().invoke(cli.app, [*command, "--format", "json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert list(report["known_frames"]) == ["interpolation", "region"] and report["newly_made"] == 10
    for by_way in report["known_frames"].values():
        assert list(by_way) == ["timesteps", "reinject"]
        for row in by_way.values():
            assert all(0 <= row[name] <= 1 for name in (*ATTRIBUTES, "joint"))
            # A model of random weights makes nothing right, and holds what it is given as well as its VAE can.
            assert row["made_db"] < 15 < row["model_db"]
        assert by_way["timesteps"]["vae_db"] == by_way["reinject"]["vae_db"]
        assert by_way["timesteps"]["made_db"] != by_way["reinject"]["made_db"]
    assert report["known_frames"]["region"]["reinject"]["given_db"] is None  # put back exactly
    assert report["known_frames"]["interpolation"]["timesteps"]["given_db"] < 30
    assert {one["told_by"] for one in report["videos"]} == {"timesteps", "reinject"}
    assert Image.open(folder / "sheet.png").size == (4 * 5 * 128, 4 * (128 + 14))

    (folder / "region" / "reinject" / "001.mp4").unlink()
    again = CliRunner().invoke(cli.app, command)
    assert again.exit_code == 0, again.output
    after = json.loads((folder / "report.json").read_text())
    assert after["newly_made"] == 1 and after["known_frames"] == report["known_frames"]
    assert "exact" in next(line for line in again.stdout.splitlines() if line.startswith("region, reinject"))


def test_a_model_without_known_frames_is_scored_by_reinjection(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = known_frames.trials(asked(tmp_path, str(tiny_checkpoint), only=("image",)))
    assert [list(trial.made) for trial in found] == [["image/reinject"]] * 2


def test_what_is_given_is_what_the_plan_knows(tiny_expanded: Path, tmp_path: Path) -> None:
    (trial, _) = known_frames.trials(asked(tmp_path, str(tiny_expanded)))
    source = known_frames.source_of(tmp_path, 0, trial.real.plan)
    true = video.read(source.frames).frames
    for name, job in trial.made.items():
        used = given.of(replace(job.plan, known_frames="reinject"))
        assert used is not None and used.num_windows == 1
        known = known_frames.USES[name.split("/")[0]].known(source, 128, 128)
        # From a video that has nothing right: what is given comes from the clip, and from nowhere else.
        canvas = used.canvas([])
        frames = used.finish([np.where(canvas.known[..., None], canvas.frames, 255 - canvas.frames)])
        same = (frames == true).all(-1)
        assert frames.shape == true.shape and same[known].all(), name
        assert 0 < known.mean() < 1 and same[~known].mean() < 0.2, name


def test_errors_are_those_of_the_pixels_asked_for() -> None:
    one, other = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 10, np.uint8)
    where = np.zeros((2, 4, 4), bool)
    where[0] = True
    other[1] = 200
    assert known_frames.squared_error(one, other, where) == known_frames.squared_error(other, one, where) == 100
    assert scores.decibels(100) == pytest.approx(28.13, abs=0.01)
    assert scores.decibels(0) is None


def asked(folder: Path, model: str, **changes: Any) -> Evaluation:
    """Return what `vgen eval known-frames` asks of two prompts."""
    given_fields = {"num_inference_steps": 1, "device": "cpu"}
    return Evaluation(
        task="known-frames", folder=folder, num_prompts=2, seed=0, model=model, given=given_fields, **changes
    )
