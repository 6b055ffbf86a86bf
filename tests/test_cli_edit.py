"""`vgen edit` and `vgen invert` with a real, tiny, random model: what is written, reported, refused and repeated."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from tests import tiny_cogvideox, tiny_hunyuan_video, tiny_lora, tiny_ltx_video
from vgen import cli, manifest, video
from vgen.backbones.wan import Wan
from vgen.editing import footage

EDIT = ("--source", "a red ball", "--target", "a blue cube", "--steps", "4", "--dtype", "float32")
SIZE = ("--width", "32", "--height", "32", "--frames", "5")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture = [
        "-f",
        "lavfi",
        "-i",
        "testsrc=size=50x38:rate=16:duration=0.5",
        "-f",
        "lavfi",
        "-i",
        "sine=duration=0.5",
    ]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *picture, "-pix_fmt", "yuv420p", "clip.mp4"]
    subprocess.run(command, check=True)


@pytest.fixture
def model(tiny_checkpoint: Path) -> tuple[str, ...]:
    return ("--model", str(tiny_checkpoint), *SIZE)


def vgen(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def made(*arguments: str) -> dict[str, Any]:
    result = vgen(*arguments, "--format", "json")
    assert result.exit_code == 0, result.stderr
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


def refused(*arguments: str) -> str:
    result = vgen(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.stderr)
    return result.stderr


def test_an_edit_has_the_clips_size_rate_length_and_sound(model: tuple[str, ...]) -> None:
    left_half()
    sharing = ("--method", "rf-solver", "--inject", "2", "--mask", "mask.png")
    result = vgen("edit", "clip.mp4", *EDIT, *model, *sharing, "--compare", "-o", "o.mp4")
    assert result.exit_code == 0, result.stderr
    # Before it starts: how the clip is fitted; and after the model is known, what the store takes.
    assert "The clip is 50x38 and the model sees 32x32: it is scaled to 32x24 and padded" in result.stderr
    assert "The clip has 8 frames and the model takes 5 at once: it is edited in 2 parts" in result.stderr
    assert "V of 2 steps takes" in result.stderr
    clip, edited, both = (footage.read(Path(name)) for name in ("clip.mp4", "o.mp4", "o.mp4.compare.mp4"))
    assert edited.frames.shape == clip.frames.shape == (8, 38, 50, 3)
    assert both.frames.shape == (8, 38, 100, 3)
    assert edited.fps == clip.fps == 16
    sound = footage.sound(edited, 0.5)
    assert sound is not None
    assert np.abs(sound.waveform).max() > 0.05
    assert (edited.frames != clip.frames).any()

    measures = manifest.read(Path("o.mp4"))["measures"]
    assert measures["store_hit_rate"] == 1
    # Two windows of 4 steps with two evaluations each, of which denoising has guidance.
    assert measures["evaluations"] == {"inversion": 16, "round trip": 16, "edit": 32}
    assert measures["reconstruction_psnr"] > 20
    for name in ("background_psnr", "background_ssim", "change_inside", "flicker", "source_flicker"):
        assert isinstance(measures[name], float)
        assert name in result.stdout


def test_from_gives_the_same_edit_again(model: tuple[str, ...]) -> None:
    vgen("edit", "clip.mp4", *EDIT, *model, "--method", "flowedit:averages=2", "--seed", "3", "-o", "one.mp4")
    made("edit", "--from", "one.mp4", "-o", "two.mp4")
    made("edit", "--from", "one.mp4", "--seed", "4", "-o", "three.mp4")
    one, two, three = (video.read(Path(f"{name}.mp4")).frames for name in ("one", "two", "three"))
    np.testing.assert_array_equal(one, two)
    assert (one != three).any()
    Path("clip.mp4").write_bytes(Path("one.mp4").read_bytes())
    result = vgen("edit", "--from", "one.mp4", "-o", "four.mp4")
    assert result.exit_code == 1
    assert "has changed since the video was made" in result.stderr


def left_half() -> None:
    """Write a mask.png that is white in the 20 columns on the left."""
    mask = np.zeros((38, 50), np.uint8)
    mask[:, :20] = 255
    Image.fromarray(mask).save("mask.png")


def test_outside_of_a_mask_the_clip_stays_as_it_is(model: tuple[str, ...]) -> None:
    left_half()
    for method in ("rf-solver", "fireflow", "flowedit", "sdedit"):
        out = f"{method}.png"
        report = made(
            "edit", "clip.mp4", *EDIT, *model, "--method", method, "--mask", "mask.png", "--border", "4", "-o", out
        )
        clip, edited = footage.read(Path("clip.mp4")).frames, footage.read(Path(out)).frames
        np.testing.assert_array_equal(edited[:, :, 25:], clip[:, :, 25:])
        assert (edited[:, :, :20] != clip[:, :, :20]).mean() > 0.5
        assert report["measures"]["region"] == 0.4


def test_an_inversion_serves_several_edits(model: tuple[str, ...]) -> None:
    inverse = ("--source", "a red ball", "--method", "rf-solver", "--steps", "4", "--dtype", "float32")
    report = made("invert", "clip.mp4", *inverse, *model, "--inject", "2", "-o", "noise.safetensors")
    assert report["measures"]["evaluations"] == {"inversion": 16, "round trip": 16}
    options = ("--method", "rf-solver", "--inject", "2", "--dtype", "float32")
    direct = made("edit", "clip.mp4", *EDIT, *model, *options, "-o", "direct.png")
    reused = made(
        "edit",
        "clip.mp4",
        "--noise",
        "noise.safetensors",
        "--target",
        "a blue cube",
        "--dtype",
        "float32",
        "-o",
        "reused.png",
    )
    np.testing.assert_array_equal(footage.read(Path("direct.png")).frames, footage.read(Path("reused.png")).frames)
    assert reused["measures"]["reconstruction_psnr"] == direct["measures"]["reconstruction_psnr"]
    assert "inversion" not in reused["measures"]["evaluations"]
    assert reused["measures"]["store_hit_rate"] == 1
    fewer = made(
        "edit", "clip.mp4", "--noise", "noise.safetensors", "--target", "a ball", "--inject", "1", "-o", "o.png"
    )
    assert fewer["measures"]["store_bytes"] == reused["measures"]["store_bytes"] / 2

    reuse = ("--noise", "noise.safetensors", "--target", "a blue cube", "-o", "refused.mp4")
    assert "was made with num inference steps 4, and 5 is given" in refused("edit", "clip.mp4", *reuse, "--steps", "5")
    assert "holds V of 2 steps" in refused("edit", "clip.mp4", *reuse, "--inject", "3")
    assert "was made with method rf-solver" in refused("edit", "clip.mp4", *reuse, "--method", "flowedit")
    assert "the noise of another clip" in refused("edit", "direct.png", *reuse)
    Path("broken.safetensors").write_bytes(Path("noise.safetensors").read_bytes()[:100])
    result = vgen("edit", "clip.mp4", "--noise", "broken.safetensors", "--target", "a cube")
    assert result.exit_code == 1
    assert "Cannot read the inversion" in result.stderr


def test_an_edit_takes_the_options_of_generating(tiny_checkpoint: Path, model: tuple[str, ...]) -> None:
    tiny_lora.save(Path("a.safetensors"), tiny_lora.wan(tiny_checkpoint))
    inverted = (*EDIT, *model, "--method", "rf-solver", "--seed", "1", "--inject", "2", "--mask", "none")
    plain = made("edit", "clip.mp4", *inverted, "-o", "plain.png")
    sparse = ("--attention", "radial:block=16,width=0.5,sink=0", "--lora", "a.safetensors:0.5")
    report = made("edit", "clip.mp4", *inverted, *sparse, "--performance", "memory", "-o", "o.png")
    assert report["measures"]["store_hit_rate"] == plain["measures"]["store_hit_rate"] == 1
    assert report["measures"]["store_bytes"] == plain["measures"]["store_bytes"]
    # The same blocks are left out on all ways, there, back and to the target: it is one flow.
    (did,) = report["attention"]
    assert did["sparse_calls"] == did["calls"] > 0
    assert report["measures"]["reconstruction_psnr"] > plain["measures"]["reconstruction_psnr"] - 10
    told = manifest.read(Path("o.png"))
    assert (told["request"]["lora"], told["performance"]["tiling"]) == (
        [f"{Path('a.safetensors').absolute()}:0.5"],
        True,
    )
    assert told["checkpoint"]["loras"][0]["matched"] > 0
    assert (video.read(Path("o.png")).frames != video.read(Path("plain.png")).frames).any()
    again = made("edit", "--from", "o.png", "-o", "again.png")
    np.testing.assert_array_equal(video.read(Path("again.png")).frames, video.read(Path("o.png")).frames)
    assert again["attention"] == report["attention"]
    plan = made("edit", "clip.mp4", *inverted, *sparse, "--dry-run", "-o", "other.png")
    assert plan["attention"] == sparse[1] and plan["chosen"]["offload"] == "none"


def test_an_inversion_with_a_lora_is_for_edits_with_it(tiny_checkpoint: Path, model: tuple[str, ...]) -> None:
    tiny_lora.save(Path("a.safetensors"), tiny_lora.wan(tiny_checkpoint))
    asked = ("--source", "a ball", "--steps", "2", *model)
    made(
        "invert", "clip.mp4", *asked, "--lora", "a.safetensors", "--attention", "tile:block=16", "-o", "n.safetensors"
    )
    edit = ("edit", "clip.mp4", "--noise", "n.safetensors", "--target", "a cube", "-o", "o.png")
    report = made(*edit, "--lora", "a.safetensors:1")
    assert report["attention"][0]["pattern"] == "tile"
    assert "was made with lora" in refused(*edit, "--lora", "a.safetensors:0.5")
    assert "was made with attention tile:block=16" in refused(*edit, "--attention", "radial:block=16")


def decoding(fails: int) -> Callable[..., Any]:
    """Return a decode for which memory runs out when it is called for the time `fails`."""
    calls, decode = itertools.count(1), Wan.decode

    def decoded(*arguments: Any) -> Any:
        if next(calls) == fails:
            raise MemoryError
        return decode(*arguments)

    return decoded


def test_a_failed_decode_keeps_the_latents_and_decode_finishes(
    model: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (*EDIT, *model, "--method", "flowedit", "--seed", "3", "--mask")
    left_half()
    for name, mask in (("auto", "auto"), ("given", "mask.png")):
        made("edit", "clip.mp4", *asked, mask, "-o", f"{name}-whole.png")
        with monkeypatch.context() as patch:
            patch.setattr(Wan, "decode", decoding(1))
            result = vgen("edit", "clip.mp4", *asked, mask, "-o", f"{name}.png")
        latents = f"{name}.png.latents.safetensors"
        assert result.exit_code == 1
        assert "memory ran out while decoding" in result.stderr
        assert f"vgen decode {latents}" in result.stderr
        # The first of two parts is finished: the other one stays as it is in the clip.
        begun = vgen("decode", latents, "-o", f"{name}-begun.png")
        assert "1 of the clip's 2 parts had been edited" in begun.stderr
        clip, begun_frames = (footage.read(Path(path)).frames for path in ("clip.mp4", f"{name}-begun.png"))
        np.testing.assert_array_equal(begun_frames[5:], clip[5:])
        assert (begun_frames[:3] != clip[:3]).any()

        with monkeypatch.context() as patch:
            patch.setattr(Wan, "decode", decoding(2))
            assert vgen("edit", "clip.mp4", *asked, mask, "-o", f"{name}.png", "--force").exit_code == 1
        report = made("decode", latents)
        whole = footage.read(Path(f"{name}-whole.png")).frames
        np.testing.assert_array_equal(footage.read(Path(f"{name}.png")).frames, whole)
        one, other = (manifest.read(Path(path)) for path in (f"{name}.png", f"{name}-whole.png"))
        assert one["measures"] == other["measures"] == report["measures"]
        assert {**one["request"], "offload": None} == {**other["request"], "offload": None}
    kept = made("edit", "clip.mp4", *asked, "none", "--keep-latents", "-o", "kept.mp4")["latents"]
    assert kept == ["kept.mp4.latents.safetensors"]
    Path("clip.mp4").write_bytes(Path("kept.mp4").read_bytes())
    changed = vgen("decode", *kept, "-o", "other.mp4")
    assert (changed.exit_code, "The video has changed" in changed.stderr) == (1, True)


def test_a_dry_run_tells_the_plan_and_makes_nothing(model: tuple[str, ...]) -> None:
    before = sorted(Path().iterdir())
    plan = made("edit", "clip.mp4", *EDIT, *model, "--fps", "8", "--dry-run", "-o", "o.mp4")
    assert (plan["dry_run"], plan["output"], plan["windows"], plan["fit"]) == (True, "o.mp4", 1, "pad")
    assert any("8 frames become 4" in note for note in plan["notes"])
    assert any("last frame is held from 4 frames to 5" in note for note in plan["notes"])
    assert "noise.safetensors" in vgen("invert", "clip.mp4", *model, "--dry-run").stdout
    assert sorted(Path().iterdir()) == before


def test_fewer_frames_for_the_model_give_all_frames_back(model: tuple[str, ...]) -> None:
    made("edit", "clip.mp4", *EDIT, *model, "--method", "sdedit", "--fps", "8", "-o", "o.png")
    frames = footage.read(Path("o.png")).frames
    assert len(frames) == 8
    assert all((frames[i] == frames[i + 1]).all() for i in (0, 2, 4, 6))
    assert (frames[1] != frames[2]).any()


def test_without_a_source_the_prompt_is_empty_and_that_is_said(model: tuple[str, ...]) -> None:
    result = vgen("edit", "clip.mp4", "--target", "a blue cube", *model, "--dry-run")
    assert result.exit_code == 0
    assert "No --source" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--target", ""), "The target prompt is empty"),
        ((), "There is no target prompt"),
        (("--target", "a  ball", "--source", "a ball"), "say the same"),
        (("--target", "a", "--strength", "0"), "A strength of 0 is not legal"),
        (("--target", "a", "--inject", "-1"), "-1 steps cannot be injected"),
        (("--target", "a", "--method", "rf-solver", "--steps", "4", "--inject", "5"), "more than the 4 steps"),
        (("--target", "a", "--method", "flowedit", "--inject", "1"), "carries V over from an inversion"),
        (("--target", "a", "--method", "rf-solvr"), 'Did you mean "rf-solver"'),
        (("--target", "a", "--method", "rf-solver:share=tme"), 'There is no share "tme"'),
        (("--target", "a", "--method", "rf-solver:begin=1"), "are none"),
        (("--target", "a", "--method", "fireflow:fresh=2"), "A share of 2 fresh noise is not legal"),
        (("--target", "a", "--mask", "missing.png"), "There is no mask missing.png"),
        (("--target", "a", "--mask", "small.png"), "is 8x8 and the clip 50x38"),
        (("--target", "a", "--mask", "short"), "has 3 frames and the clip 8"),
        (("--target", "a", "--mask", "black.png"), "is black all over"),
        (("--target", "a", "--fit", "squeeze"), 'There is no fit "squeeze"'),
        (("--target", "a", "--method", "euler", "--attention", "adaspa"), "not be that of the inversion"),
        (("--target", "a", "--method", "euler", "--inject", "1", "--compile"), "takes V out of the blocks"),
        (("--target", "a", "--lora", "missing.safetensors"), "missing.safetensors"),
        (("--target", "a", "--guidance-scale-2", "3"), "has one transformer"),
        (("--target", "a", "--offload", "model", "--device", "cpu"), "main memory"),
        (("--target", "a", "--width", "30"), "A width of 30 is not legal"),
        (("--target", "a", "--overlap", "5"), "An overlap of 5 frames is not possible"),
        (("--target", "a", "--overlap", "-5", "--seconds", "0.1"), "An overlap of -5 frames is not possible"),
        (("--target", "a", "--seconds", "0"), "--seconds 0 is not legal"),
        (("--target", "a", "--seconds", "1e-9"), "--seconds 1e-09 is not legal"),
        (("--target", "a", "--start", "1e300"), "--start 1e+300 is not legal"),
        (("--target", "a", "--start", "9"), "holds no frames after second 9.\nTip: choose a lower --start."),
        (("--target", "a", "-o", "out.avi"), "no format that vgen writes"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(
    tiny_checkpoint: Path, arguments: tuple[str, ...], reason: str
) -> None:
    Image.new("L", (8, 8), 255).save("small.png")
    Image.new("L", (50, 38), 0).save("black.png")
    Path("short").mkdir()
    for number in range(3):
        Image.new("L", (50, 38), 255).save(f"short/{number}.png")
    size = [] if "--width" in arguments else ["--width", "32", "--height", "32"]
    message = refused("edit", "clip.mp4", "--model", str(tiny_checkpoint), *size, "--frames", "5", *arguments)
    assert reason in message
    assert "Loading" not in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fastwan2.1-1.3b", "distilled to a few steps"),
        ("ltx-2", "picture and sound"),
        ("wan2.1-i2v-480p", "first image"),
    ],
)
def test_models_that_cannot_edit_are_refused_with_the_reason(name: str, reason: str) -> None:
    from vgen import checkpoints

    found = [known for known in checkpoints.names() if known.startswith(name)]
    assert found
    assert reason in refused("edit", "clip.mp4", "--target", "a cube", "--model", found[0])


@pytest.mark.parametrize(
    ("family", "size"),
    [
        (tiny_hunyuan_video, ("--width", "48", "--height", "32", "--frames", "9")),
        (tiny_ltx_video, ("--width", "96", "--height", "64", "--frames", "9")),
        (tiny_cogvideox, ("--width", "64", "--height", "48", "--frames", "9")),
    ],
)
def test_other_families_edit_by_the_same_code(tmp_path: Path, family: Any, size: tuple[str, ...]) -> None:
    model = ("--model", str(family.build(tmp_path / "model")), *size)
    method = ("--method", "fireflow:store=disk,begin=0.5", "--inject", "2", "--mask", "auto")
    report = made("edit", "clip.mp4", *EDIT, *model, *method, "-o", "out.mp4")
    assert report["measures"]["store_hit_rate"] == 1
    assert report["measures"]["store_bytes"] > 0
    assert report["measures"]["reconstruction_psnr"] > 10
    assert footage.read(Path("out.mp4")).frames.shape == (8, 38, 50, 3)
    # The folder of the features is gone.
    assert sorted(path.name for path in Path().iterdir()) == ["clip.mp4", "model", "out.mp4", "out.mp4.json"]


def test_the_noise_of_the_current_folder_lies_in_it(model: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("frames").mkdir()
    monkeypatch.chdir("frames")
    Image.new("RGB", (50, 38)).save("0.png")
    result = vgen("invert", ".", *model, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == "clip.noise.safetensors"


def test_sdedit_does_not_invert() -> None:
    assert "does not invert" in refused("invert", "clip.mp4", "--method", "sdedit")


def test_other_videos_are_not_edits(model: tuple[str, ...]) -> None:
    vgen("generate", "a red ball", *model, "--steps", "1", "-o", "made.mp4")
    assert "was not made by vgen edit" in refused("edit", "--from", "made.mp4")
