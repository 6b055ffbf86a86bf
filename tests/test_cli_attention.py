from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vgen.attention import PATTERNS, kernels
from vgen.cli import app
from vgen.video import read

SIZE = ["--width", "64", "--height", "32", "--frames", "17", "--steps", "3", "--dtype", "float32"]


def run(*arguments: str, fails: int = 0) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == fails, done.output
    return done


def printed(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--format", "json").stdout)


def test_list_tells_options_and_defaults_of_every_method() -> None:
    found = printed("attention", "list")
    assert set(found["methods"]) == set(PATTERNS) and set(found["kernels"]) == set(kernels.KERNELS)
    assert found["methods"]["adaspa"] == {
        "block": 64, "kernel": "auto", "sparsity": 0.8, "warmup": 0.2, "search": "0.2+0.6", "adaptive": True,
    }  # fmt: skip
    text = run("attention", "list").stdout
    assert "global=1" in text and "adaptive=true" in text
    assert "sparsity is the share of the blocks that is left out" in text


def test_generate_says_what_was_left_out_and_records_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    video = tmp_path / "ball.mp4"
    common = ["generate", "a red ball", "--model", str(tiny_checkpoint), *SIZE, "-o", str(video)]
    asked = "tile:global=1,kernel=gather,block=16"
    done = run(*common, "--attention", asked)
    assert "Attention: tile, run by gather, left out 48.0% of the pairs of tokens" in done.stderr
    manifest = json.loads((tmp_path / "ball.mp4.json").read_text())
    assert manifest["attention"]["sparsity"] == 0.48 and manifest["request"]["attention"] == asked
    again = printed("generate", "--from", str(video), "-o", str(tmp_path / "again.mp4"))
    assert again["attention"] == [manifest["attention"]]
    assert np.array_equal(read(video).frames, read(tmp_path / "again.mp4").frames)
    plan = printed(*common, "--attention", asked, "--dry-run", "--force")["plans"][0]
    assert plan["attention"] == asked
    early = run(*common, "--force", "--attention", "adaspa:warmup=1,kernel=gather")
    assert "left out nothing; all" in early.stderr


@pytest.mark.parametrize(
    ("asked", "code", "message"),
    [
        ("adaspo", 2, 'Did you mean "adaspa"'),
        ("adaspa:sparsity=2", 2, "sparsity of 2 is not legal"),
        ("adaspa:kernel=triton", 1, '"triton" cannot be used here'),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    asked: str, code: int, message: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vgen import backbones

    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(backbones, "load", load)
    common = ["generate", "a red ball", "--model", str(tiny_checkpoint), "--device", "cpu"]
    assert message in run(*common, "--attention", asked, fails=code).stderr


def test_a_ring_is_refused_and_says_why(tiny_checkpoint: Path) -> None:
    common = ["generate", "a red ball", "--model", str(tiny_checkpoint), "--attention", "tile", "--dry-run"]
    refused = run(*common, "--gpus", "2", "--context-parallel", "ring", "--device", "cuda", fails=2)
    assert "no GPU has all keys of a head" in refused.stderr


def test_show_draws_maps_and_masks(tiny_checkpoint: Path, tmp_path: Path) -> None:
    methods = ["--attention", "tile:block=16", "--attention", "adaspa:block=16,sparsity=0.5"]
    arguments = ["a red ball", "--model", str(tiny_checkpoint), "--layers", "1", "--heads", "0,1"]
    found = printed("attention", "show", *arguments, *methods, *SIZE, "-o", str(tmp_path / "maps"))
    masks = found["masks"]
    assert [(one["method"].split(":")[0], one["head"]) for one in masks] == [
        ("tile", 0), ("tile", 1), ("adaspa", 0), ("adaspa", 1),
    ]  # fmt: skip
    assert all(0 < one["recall"] < 1 and 0 < one["sparsity"] < 1 for one in masks)
    assert masks[0]["sparsity"] == 0.48
    picture = np.asarray(Image.open(tmp_path / "maps" / masks[0]["picture"]))
    assert picture.shape == (3 * (270 + 8) + 2 * 14, 2 * 256 + 8, 3)
    grey = (picture == 205).all(-1)
    assert not grey[14:270].any()  # the map itself
    # 5 frames: the diagonal, and the first that sees and is seen by all.
    assert abs(grey[278 + 14 : 278 + 270, :256].mean() - 0.48) < 0.02
    assert "There is no layer 7" in run(
        "attention", "show", "a", "--model", str(tiny_checkpoint), "--layers", "7", *SIZE, "-o", str(tmp_path / "x"),
        fails=2,
    ).stderr  # fmt: skip


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["show", "a", "--at-steps", "3"], "There is no step 3"),
        (["show", "a", "--heads", "one"], 'Cannot read --heads "one"'),
        (["show", "a", "--layers", "-1"], 'Cannot read --layers "-1"'),
        (["show", "a", "--attention", "adaspo"], 'Did you mean "adaspa"'),
        (["search", "--block", "70"], "block of 70 tokens"),
        (["search", "--threshold", "0"], "threshold of 0"),
    ],
)
def test_maps_and_plans_that_cannot_be_are_refused_before_anything_is_loaded(
    command: list[str], message: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vgen import backbones

    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(backbones, "load", load)
    whole = [*command, "--model", str(tiny_checkpoint), *SIZE, "-o", str(tmp_path / "x")]
    assert message in run("attention", *whole, fails=2).stderr


def test_what_is_there_is_not_taken_away(tmp_path: Path) -> None:
    file, folder = tmp_path / "notes.txt", tmp_path / "thesis"
    file.touch()
    folder.mkdir()
    assert "is to be a folder" in run("attention", "show", "a", "-o", str(file), fails=2).stderr
    refused = run("attention", "search", "--force", "-o", str(folder), fails=2).stderr
    assert f"use -o {folder / 'tile.json'}" in refused
    assert folder.is_dir()


def test_an_empty_cache_is_none_to_compare_with() -> None:
    assert "made in one way" in run("compare", "a", "--cache", "", fails=2).stderr


def test_heads_that_the_model_lacks_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["a", "--model", str(tiny_checkpoint), "--heads", "0,9", *SIZE, "-o", str(tmp_path / "x")]
    assert "There is no head 9" in run("attention", "show", *arguments, fails=2).stderr


def test_search_writes_a_plan_that_generate_uses(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    common = ["attention", "search", "--model", str(tiny_checkpoint), *SIZE, "--prompt", "a red ball", "--block", "16"]
    loose = printed(*common, "--threshold", "1", "-o", str(plan))
    assert [layer["global"] for layer in loose["layers"]] == [1, 1] and loose["sparsity"] == 0.48
    errors = [list(layer["errors"].values()) for layer in loose["layers"]]
    assert all(0 < error[1] < error[0] < 1 for error in errors)  # with more frames, less error
    between = (errors[0][0] + errors[0][1]) / 2
    tight = printed(*common, "--threshold", str(between), "-o", str(tmp_path / "tight.json"))
    assert tight["layers"][0]["global"] == 2
    none = printed(*common, "--threshold", "1e-9", "-o", str(tmp_path / "none.json"))
    assert none["sparsity"] == 0 and none["layers"][0]["global"] is None
    made = printed(
        "generate", "a red ball", "--model", str(tiny_checkpoint), *SIZE, "-o", str(tmp_path / "a.mp4"),
        "--attention", f"tile:plan={plan},block=16,kernel=gather",
    )  # fmt: skip
    assert made["attention"][0]["sparsity"] == 0.48


def test_compare_tells_speed_likeness_and_recall(tiny_checkpoint: Path, tmp_path: Path) -> None:
    common = ["compare", "a red ball", "--model", str(tiny_checkpoint), *SIZE, "-o", str(tmp_path / "c")]
    found = printed(*common, "--attention", "tile:global=1,block=16,kernel=gather")
    assert found["fast"]["sparsity"] == 0.48 and found["plain"]["sparsity"] == 0
    assert found["plain"]["kernel"] == "torch" and found["plain"]["recall"] is None
    assert [layer["sparsity"] for layer in found["fast"]["layers"]] == [0.48, 0.48]
    assert all(0 < layer["recall"] < 1 for layer in found["fast"]["layers"])
    assert all(found[name][f"{what}_s"] > 0 for name in ("fast", "plain") for what in ("denoise", "attention"))
    assert 10 < found["psnr"] < 100 and 0 < found["ssim"] < 1
    assert read(tmp_path / "c" / "compare.mp4").frames.shape == (17, 32, 128, 3)
    same = printed(*common, "--attention", "tile:global=5,block=16,kernel=gather", "--force")
    assert same["psnr"] > 45 and same["ssim"] > 0.99
    assert "made in one way" in run(*common, "--attention", "dense", fails=2).stderr


def test_bench_prints_what_programs_read() -> None:
    small = ["--tokens", "300", "--heads", "2", "--head-dim", "16", "--repeats", "1", "--dtype", "float32"]
    found = printed("bench", "attention", *small, "--density", "0.4", "--kernel", "gather")
    assert found["density"] == pytest.approx(2 / 5, abs=0.05)
    assert found["speedup"] == pytest.approx(found["dense_s"] / found["sparse_s"])
    assert found["ideal"] == pytest.approx(1 / found["density"])
    assert found["efficiency"] == pytest.approx(found["speedup"] / found["ideal"])
    assert found["kernel"] == "gather"
    for bad, message in (
        (["--density", "0"], "density of 0"),
        (["--heads", "1" + "0" * 400], "The tensors do not fit"),
        (["--block", "65"], "block of 65"),
        (["--kernel", "flex", "--block", "32"], "does no blocks of 32"),
        (["--random-weights", "wan2.1-1.3b"], "--tokens, --heads and --head-dim have no effect"),
        (["--attention", "adaspa"], "--attention is for --random-weights"),
    ):
        assert message in run("bench", "attention", *small, *bad, fails=2).stderr
    assert "No shapes are known" in run("bench", "attention", "--random-weights", "wan9", fails=2).stderr


def test_bench_runs_a_block_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from vgen.pipelines.bench import attention as bench

    narrow = {"num_attention_heads": 2, "attention_head_dim": 16}
    models = {
        "wan": ("wan", {**narrow, "ffn_dim": 32}, (3, 4, 5)),
        "hunyuan": ("hunyuan-video", {**narrow, "rope_axes_dim": (4, 6, 6)}, (3, 4, 5)),
    }
    monkeypatch.setattr(bench, "MODELS", models)
    for name in models:
        found = printed("bench", "attention", "--random-weights", name, "--attention", "adaspa:kernel=gather,block=16",
                        "--repeats", "1", "--dtype", "float32")  # fmt: skip
        # HunyuanVideo's 256 tokens of text, which see all and are seen by all, are most of so few.
        assert found["sparsity"] > (0.3 if name == "wan" else 0.005)
        assert found["tokens"] == [3, 4, 5] and found["speedup"] > 0 and found["search_s"] > 0
