"""`vgen generate` with a real, tiny, random model: what is printed, written, refused and kept."""

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

from tests import tiny_lora
from vgen import backbones, cli, manifest, outputs, video
from vgen.backbones.wan import Wan

SMALL = ("--width", "32", "--height", "32", "--frames", "5", "--steps", "2", "--dtype", "float32")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small(tiny_expanded: Path) -> list[str]:
    return ["--model", str(tiny_expanded), *SMALL]


def vgen(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def made(*arguments: str) -> dict[str, object]:
    """Run with --format json and return the one object that is printed."""
    result = vgen(*arguments, "--format", "json")
    assert result.exit_code == 0, result.stderr
    printed: dict[str, object] = json.loads(result.stdout)
    return printed


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_text_tells_the_file_and_one_breakdown(small: list[str]) -> None:
    result = vgen("generate", "a red ball", *small, "--seed", "7", "-o", "clip.mp4")
    assert result.exit_code == 0
    path, breakdown = result.stdout.splitlines()
    assert path == "clip.mp4"
    seconds = r"\d+\.\d\d s"
    stages = "  ".join(f"{stage} {seconds}" for stage in ("load", "encode", "denoise", "decode", "write", "total"))
    assert re.fullmatch(rf"{stages}  peak memory \d+ MB", breakdown)
    assert files() == ["clip.mp4", "clip.mp4.json"]
    assert video.read(Path("clip.mp4")).frames.shape == (5, 32, 32, 3)


def test_json_is_one_object_with_the_account(small: list[str]) -> None:
    printed = made("generate", "a red ball", *small, "--seed", "7", "--seed", "8", "-o", "clip.mp4")
    assert printed["outputs"] == ["clip-1.mp4", "clip-2.mp4"]
    assert printed["seeds"] == [7, 8]
    timings = printed["timings"]
    assert isinstance(timings, dict)
    assert list(timings) == ["load", "encode", "denoise", "decode", "write", "total"]
    assert all(seconds > 0 for seconds in timings.values())
    assert sum(timings.values()) - timings["total"] <= timings["total"] + 0.01
    assert isinstance(printed["peak_memory_mb"], float)
    assert printed["peak_memory_mb"] > 50


def test_random_seed_is_recorded_and_the_default_name_tells_it(small: list[str]) -> None:
    printed = made("generate", "A red ball!", *small)
    ((path,), (seed,)) = printed["outputs"], printed["seeds"]  # type: ignore[misc]
    assert re.fullmatch(rf"outputs/a-red-ball-{seed}-\d{{8}}-\d{{6}}\.mp4", path)
    assert manifest.read(Path(path))["seed"] == seed


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png"])
def test_from_gives_the_same_frames_again(small: list[str], suffix: str) -> None:
    made("generate", "a red ball", *small, "-o", f"one{suffix}")
    made("generate", "--from", f"one{suffix}", "-o", f"two{suffix}")
    one, two = (video.read(Path(f"{name}{suffix}")).frames for name in ("one", "two"))
    np.testing.assert_array_equal(one, two)
    made("generate", "--from", f"one{suffix}", "--seed", "1", "-o", f"three{suffix}")
    assert (video.read(Path(f"three{suffix}")).frames != one).any()


def test_from_keeps_what_is_not_changed(small: list[str]) -> None:
    made("generate", "a red ball", *small, "--seed", "5", "-o", "one.mp4")
    printed = made("generate", "--from", "one.mp4", "--frames", "1", "--seed", "8", "--seed", "9", "-o", "two.mp4")
    assert printed["seeds"] == [8, 9]
    request = manifest.read(Path("two-1.mp4"))["request"]
    assert (request["num_frames"], request["width"], request["prompt"]) == (1, 32, "a red ball")


def test_from_warns_when_the_weights_are_others(small: list[str], tiny_checkpoint: Path) -> None:
    made("generate", "a red ball", *small, "-o", "one.mp4")
    result = vgen("generate", "--from", "one.mp4", "--model", str(tiny_checkpoint), "--dry-run")
    assert result.exit_code == 0
    assert "weights" in result.stderr


def test_image_is_the_first_frame(small: list[str]) -> None:
    Image.new("RGB", (32, 32), (200, 40, 40)).save("first.png")
    made("generate", "it moves", *small, "--image", "first.png", "-o", "clip.png")
    assert manifest.read(Path("clip.png"))["image_sha256"]


def test_manifest_means_the_same_from_any_folder(
    tmp_path: Path, small: list[str], tiny_expanded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_expanded.parent)
    Image.new("RGB", (32, 32), (200, 40, 40)).save(tmp_path / "first.png")
    image = os.path.relpath(tmp_path / "first.png")
    one = str(tmp_path / "one.png")
    made("generate", "a", *small, "--model", tiny_expanded.name, "--image", image, "-o", one)
    monkeypatch.chdir(tmp_path)
    made("generate", "--from", "one.png", "-o", "two.png")
    np.testing.assert_array_equal(video.read(Path("one.png")).frames, video.read(Path("two.png")).frames)


def test_seconds_are_rounded_and_it_is_said(small: list[str]) -> None:
    without_frames = [word for word in small if word not in ("--frames", "5")]
    result = vgen("generate", "a", *without_frames, "--seconds", "0.5", "--fps", "8", "-o", "clip.mp4")
    assert result.exit_code == 0
    assert "rounded to 5" in result.stderr
    assert len(video.read(Path("clip.mp4")).frames) == 5
    assert vgen("generate", "a", *small, "--seconds", "0.5").exit_code == 2


def test_unknown_words_are_named(small: list[str]) -> None:
    result = vgen("generate", "a red zeppelin", *small)
    assert result.exit_code == 0
    assert '"zeppelin"' in result.stderr
    assert "--model" in result.stderr


def test_latents_are_kept_when_asked(small: list[str]) -> None:
    printed = made("generate", "a", *small, "-o", "clip.mp4", "--keep-latents")
    assert printed["latents"] == ["clip.mp4.latents.safetensors"]
    assert files() == ["clip.mp4", "clip.mp4.json", "clip.mp4.latents.safetensors"]


def test_dry_run_makes_nothing(small: list[str]) -> None:
    result = vgen("generate", "a red ball", *small, "-o", "new/clip.mp4", "--dry-run", "--format", "json")
    assert result.exit_code == 0
    (planned,) = json.loads(result.stdout)["plans"]
    assert (planned["output"], planned["width"], planned["num_frames"]) == ("new/clip.mp4", 32, 5)
    text = vgen("generate", "a red ball", *small, "-o", "new/clip.mp4", "--dry-run").stdout
    assert "num_inference_steps: 2" in text
    assert list(Path().iterdir()) == []


def test_nothing_is_replaced_without_force(small: list[str]) -> None:
    Path("clip.mp4").write_text("mine")
    result = vgen("generate", "a", *small, "-o", "clip.mp4")
    assert result.exit_code == 1
    assert "clip.mp4 exists" in result.stderr
    assert "--force" in result.stderr
    assert Path("clip.mp4").read_text() == "mine"
    assert made("generate", "a", *small, "-o", "clip.mp4", "--force")["outputs"] == ["clip.mp4"]


@pytest.mark.parametrize("content", [None, b"", b"not an image", b"\x89PNG\r\n\x1a\nhalf"])
def test_unreadable_image_is_one_clear_error(small: list[str], content: bytes | None) -> None:
    if content is not None:
        Path("first.png").write_bytes(content)
    result = vgen("generate", "a", *small, "--image", "first.png")
    assert result.exit_code == 2
    assert "first.png" in result.stderr
    assert "Traceback" not in result.output


def test_from_a_video_without_a_manifest_is_one_clear_error() -> None:
    video.save(np.zeros((1, 16, 16, 3), np.uint8), Path("other.mp4"), fps=8)
    result = vgen("generate", "--from", "other.mp4")
    assert result.exit_code == 1
    assert "other.mp4 holds no manifest" in result.stderr


def test_from_an_edit_leads_to_the_right_command(small: list[str]) -> None:
    made("generate", "a", *small, "-o", "one.mp4")
    told = json.loads(Path("one.mp4.json").read_text())
    Path("edit.json").write_text(json.dumps({**told, "task": "edit", "request": {"video": "x.mp4", "target": "a"}}))
    result = vgen("generate", "--from", "edit.json")
    assert result.exit_code == 2
    assert "was made by vgen edit" in result.stderr
    assert "vgen edit --from edit.json" in result.stderr


BATCH = """{"prompt": "a red ball"}
{"prompt": "a blue cube", "seed": 9, "frames": 1}
{"prompt": broken}

{"prompt": "a blue ball", "width": 100}
"""


def test_batch_runs_what_it_can_and_fails_as_a_whole(small: list[str]) -> None:
    Path("prompts.jsonl").write_text(BATCH)
    result = vgen("generate", "--prompts", "prompts.jsonl", *small, "--seed", "3", "-o", "c.gif", "--format", "json")
    assert result.exit_code == 1
    printed = json.loads(result.stdout)
    assert printed["outputs"] == ["c-1.gif", "c-2.gif"]
    assert printed["seeds"] == [3, 9]
    assert [failure["line"] for failure in printed["failures"]] == [3, 5]
    assert "Error in line 3: The line is not valid JSON" in result.stderr
    assert len(video.read(Path("c-2.gif")).frames) == 1


def test_batch_loads_the_model_once(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = backbones.load
    monkeypatch.setattr(backbones, "load", lambda *rest, **options: loads.append(1) or load(*rest, **options))
    Path("prompts.txt").write_text("a red ball\na blue cube\n")
    assert vgen("generate", "--prompts", "prompts.txt", *small, "-o", "clips/").exit_code == 0
    assert len(files()) == 5
    assert len(loads) == 1


def test_batch_resumes_where_it_stopped(small: list[str]) -> None:
    Path("prompts.txt").write_text("a red ball\na blue cube\n")
    arguments = ["--prompts", "prompts.txt", *small, "-o", "clips/c.gif"]
    made("generate", *arguments)
    Path("clips/c-2.gif").unlink()
    Path("clips/c-2.gif.json").unlink()
    Path("clips/c-2.gif.latents.safetensors").write_bytes(b"of a run that was killed while it decoded")
    assert made("generate", *arguments, "--resume")["outputs"] == ["clips/c-2.gif"]
    assert vgen("generate", "--prompts", "prompts.txt", *small, "--resume").exit_code == 2


def test_job_that_fails_is_reported_and_the_others_run(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_on_gif(frames: video.Frames, path: Path, **rest: object) -> None:
        if path.name == "c-1.gif":
            raise video.VgenError("The pencil broke.")
        save(frames, path, **rest)  # type: ignore[arg-type]

    save = video.save
    monkeypatch.setattr(video, "save", fails_on_gif)
    Path("prompts.txt").write_text("a red ball\na blue cube\n")
    result = vgen("generate", "--prompts", "prompts.txt", *small, "-o", "c.gif", "--format", "json")
    assert result.exit_code == 1
    printed = json.loads(result.stdout)
    assert printed["outputs"] == ["c-2.gif"]
    assert "pencil" in printed["failures"][0]["error"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_failed_decode_keeps_the_latents_and_decode_finishes(
    small: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    made("generate", "a red ball", *small, "--seed", "7", "-o", "whole.png")
    with monkeypatch.context() as patch:
        patch.setattr(Wan, "decode", fail)
        result = vgen("generate", "a red ball", *small, "--seed", "7", "-o", "clip.png")
    assert result.exit_code == 1
    assert "memory ran out" in result.stderr
    assert "vgen decode clip.png.latents.safetensors" in result.stderr
    assert not Path("clip.png").exists()

    again = vgen("generate", "a red ball", *small, "--seed", "7", "-o", "clip.png")
    assert (again.exit_code, "not finished" in again.stderr) == (1, True)

    assert made("decode", "clip.png.latents.safetensors")["outputs"] == ["clip.png"]
    np.testing.assert_array_equal(video.read(Path("clip.png")).frames, video.read(Path("whole.png")).frames)
    assert manifest.read(Path("clip.png"))["request"] == manifest.read(Path("whole.png"))["request"]


def start(small: list[str], *arguments: str, limit: int | None = None) -> "subprocess.Popen[str]":
    def prepare() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs inherit as ignored

    return subprocess.Popen(
        [sys.executable, "-m", "vgen", "generate", "a red ball", *small, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        preexec_fn=prepare,
    )


def test_ctrl_c_leaves_nothing_and_exits_130(small: list[str]) -> None:
    run = start(small, "--steps", "1000", "-o", "clip.mp4")
    assert run.stderr is not None
    while "Denoising" not in run.stderr.readline():
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    stdout, stderr = run.communicate(timeout=60)
    assert (run.returncode, stdout) == (130, "")
    assert stderr.splitlines() == ["Interrupted."]
    assert files() == []


def test_disk_that_fills_up_while_writing_keeps_the_latents(small: list[str]) -> None:
    # Latents of 2 x 4 x 4 x 16 floats have 2 kB, and a random 32 x 32 frame as PNG about as much; 5 as .mp4 more.
    run = start(small, "-o", "clip.mp4", limit=3_000)
    stdout, stderr = run.communicate(timeout=60)
    assert (run.returncode, stdout) == (1, "")
    assert "Traceback" not in stderr
    assert "vgen decode clip.mp4.latents.safetensors" in stderr
    assert files() == ["clip.mp4.latents.safetensors"]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.text(
        min_size=1, max_size=300, alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    )
    | st.sampled_from(["tabs\tand/slashes\\", "🦊🦊", "../../up", "red ball " * 1100, "--seed 7", "[bold]a[/bold]"])
)
def test_any_prompt_gives_a_video_with_a_plain_name(small: list[str], prompt: str) -> None:
    result = vgen("generate", *small, "--format", "json", "--", prompt)
    if not prompt.strip():
        assert result.exit_code == 2
        return
    assert result.exit_code == 0, result.stderr
    (path,) = json.loads(result.stdout)["outputs"]
    assert re.fullmatch(r"[a-z0-9-]+\.mp4", Path(path).name)
    assert Path(path).parent == outputs.DEFAULT_FOLDER
    assert manifest.read(Path(path))["request"]["prompt"] == prompt


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(-100, 2000), height=st.integers(-100, 2000), frames=st.integers(-10, 300))
def test_any_size_is_planned_or_refused_with_legal_ones(
    tiny_checkpoint: Path, width: int, height: int, frames: int
) -> None:
    size = {"width": width, "height": height, "frames": frames}
    options = [f"--{name}={value}" for name, value in size.items()]
    result = vgen("generate", "a", "--model", str(tiny_checkpoint), *options, "--dry-run")
    is_legal = all(16 <= side <= 1024 and side % 16 == 0 for side in (width, height)) and (
        1 <= frames <= 253 and frames % 4 == 1
    )
    assert result.exit_code == (0 if is_legal else 2)
    if not is_legal:
        suggested = re.findall(r"--(width|height|frames) (\d+)", result.stderr)
        assert suggested
        for name, value in suggested:
            legal = {"width": 32, "height": 32, "frames": 5, name: int(value)}
            options = [f"--{name}={value}" for name, value in legal.items()]
            assert vgen("generate", "a", "--model", str(tiny_checkpoint), *options, "--dry-run").exit_code == 0


def test_loras_are_planned_told_and_kept_in_the_manifest(
    small: list[str], tiny_expanded: Path, tmp_path: Path
) -> None:
    path = tiny_lora.save(tmp_path / "style.safetensors", tiny_lora.wan(tiny_expanded))
    asked = ["generate", "a red ball", *small, "--seed", "7", "--lora", "style.safetensors:0.5"]
    dry = vgen(*asked, "--dry-run", "-o", "clip.mp4")
    assert f"LoRA on the transformer: {path}, scale 0.5" in dry.stdout
    assert made(*asked, "--dry-run")["plans"][0]["lora"] == [f"{path}:0.5"]  # type: ignore[index]
    result = vgen(*asked, "-o", "clip.mp4")
    assert result.exit_code == 0, result.stderr
    assert "LoRA style.safetensors: 20 of 20 layers matched.\n" in result.stderr
    kept = manifest.read(Path("clip.mp4"))
    assert kept["request"]["lora"] == [f"{path}:0.5"]
    (lora,) = kept["checkpoint"]["loras"]
    assert (lora["sha256"], lora["scale"]) == (hashlib.sha256(path.read_bytes()).hexdigest(), 0.5)
    assert (lora["matched"], lora["num_layers"]) == (20, 20)
    again = vgen("generate", "--from", "clip.mp4", "-o", "again.mp4")
    assert again.exit_code == 0, again.stderr
    assert "Warning" not in again.stderr
    frames, same = (video.read(Path(name)).frames for name in ("clip.mp4", "again.mp4"))
    assert np.array_equal(frames, same)
    without = vgen(*asked[:-2], "-o", "without.mp4")
    assert without.exit_code == 0, without.stderr
    assert not np.array_equal(frames, video.read(Path("without.mp4")).frames)
    tiny_lora.save(path, tiny_lora.wan(tiny_expanded, seed=1))
    changed = vgen("generate", "--from", "clip.mp4", "-o", "changed.mp4")
    assert changed.exit_code == 1
    assert f"The LoRA {path} has changed since the video was made." in changed.stderr


def test_each_line_of_a_batch_may_have_its_own_loras(small: list[str], tiny_expanded: Path, tmp_path: Path) -> None:
    tiny_lora.save(tmp_path / "style.safetensors", tiny_lora.wan(tiny_expanded))
    lines = [
        {"prompt": "a red ball"},
        {"prompt": "a red ball", "lora": ["style.safetensors"]},
        {"prompt": "a red ball"},
    ]
    Path("prompts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    result = vgen("generate", "--prompts", "prompts.jsonl", *small, "--seed", "7", "-o", "clip.png")
    assert result.exit_code == 0, result.stderr
    one, other, third = (video.read(Path(f"clip-{i}.png")).frames for i in (1, 2, 3))
    assert np.array_equal(one, third)
    assert not np.array_equal(one, other)
