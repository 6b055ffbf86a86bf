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
from vgen.pipelines.evaluate import edit, known_frames, scores, trials
from vgen.pipelines.evaluate.trials import Evaluation
from vgen.toyland.prompts import ATTRIBUTES, Prompt, held_out, truth


class Said(dict[str, str]):
    """Readings as the score takes them."""


def test_scores_count_what_is_read_and_right() -> None:
    truths = [truth(prompt.clip) for prompt in held_out()[:3]]
    readings = [Said(told) for told in truths]
    readings[1]["colour"] = "none of them"
    found = scores.score(readings, truths)
    assert found == dict.fromkeys(ATTRIBUTES, 1.0) | {"colour": 0.6667, "joint": 0.6667}
    pairs = [(one, two) for one in truths for two in truths if one is not two]
    shuffled = sum(one["camera"] == two["camera"] for one, two in pairs) / len(pairs)
    assert scores.floor(readings, truths)["camera"] == pytest.approx(shuffled, abs=1e-4)


def test_what_is_gained_has_the_error_of_the_videos_that_differ() -> None:
    before, after = [True] * 6 + [False] * 4, [True] * 5 + [False] + [True, True] + [False] * 2
    told = scores.gained(after, before)
    assert told == {
        "joint_gained": 0.1,
        "joint_gained_error": 0.1703,
        "gained_and_lost": [2, 1],
    }
    assert scores.gained(before, before)["joint_gained_error"] == 0


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


def test_pairs_differ_in_one_attribute_and_its_words() -> None:
    found = edit.pairs(8)
    assert [pair.attribute for pair in found] == 2 * ["colour", "shape", "scene", "action"]
    for pair in found:
        one, other = truth(pair.source), truth(pair.target)
        assert [name for name in ATTRIBUTES if one[name] != other[name]] == [pair.attribute]
        assert pair.prompts[0] != pair.prompts[1]
        assert len(set(pair.prompts[0].split()) - set(pair.prompts[1].split())) <= 4


def test_true_edits_are_judged_right_and_clips_left_alone_wrong(tmp_path: Path) -> None:
    asked = Evaluation(
        task="edit", folder=tmp_path, num_prompts=4, seed=0, model="toyland", given={}, only=("sdedit",)
    )
    found = edit.trials(asked)
    for trial, pair in zip(found, edit.pairs(4), strict=True):
        for job, clip in ((trial.made["sdedit"], pair.target), (trial.real, pair.source)):
            job.output.parent.mkdir(parents=True, exist_ok=True)
            frames = trials.rendered(Prompt(text="", clip=clip), job.plan)
            measured = {"evaluations": 50.0, "seconds": 1.0}
            request = {"request": job.plan.to_dict(), "checkpoint": {}, "versions": {}}
            video.save(frames, job.output, fps=8, manifest={**request, "measured": measured})
    scores_ = edit.read(found).scores
    made, unedited = scores_["edits"]["sdedit"], scores_["unedited"]
    assert made["edited"] == made["track"] == 1
    assert made["success"] > unedited["success"] == 0
    assert made["kept_db"] > 25
    assert (made["evals"], made["seconds"]) == (50, 1)
    # All is kept of a clip that was left alone, but for what the file's compression loses.
    assert unedited["kept_db"] > 35


def test_edits_are_made_and_scored(tiny_expanded: Path, tmp_path: Path) -> None:
    command = ["eval", "edit", "--model", str(tiny_expanded), "-n", "2", "--steps", "3", "-o", str(tmp_path / "score")]
    command += ["--only", "flowedit", "--only", "rf-edit", "--device", "cpu", "--dtype", "float32"]
    result = CliRunner().invoke(cli.app, [*command, "--format", "json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    flow, shared = report["edits"]["flowedit"], report["edits"]["rf-edit"]
    # Each of 3 steps with a velocity of the source and two of the guided target, and both prompts' for the mask.
    assert flow["evals"] == 9 + 4
    assert "trip_db" not in flow
    # Two evaluations a step there, twice that back with guidance, and both prompts' for the mask.
    assert shared["evals"] == 6 + 12 + 4
    assert shared["trip_db"] > 10
    assert set(shared["by"]) == {"colour", "shape"}
    again = CliRunner().invoke(cli.app, command)
    assert [line.split()[0] for line in again.stdout.splitlines()[1:5]] == [
        "flowedit",
        "rf-edit",
        "ceiling",
        "unedited",
    ]
    wrong = CliRunner().invoke(cli.app, ["eval", "edit", "--only", "flow-edit"])
    assert wrong.exit_code == 2 and 'Did you mean "flowedit"' in wrong.stderr
