"""`vgen eval` as a whole, with a tiny checkpoint of the real classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vgen import cli, video
from vgen.pipelines.evaluate import scores
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
