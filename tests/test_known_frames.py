"""Known frames, from the pixels to the latents and back: pictures, a clip that goes on, a clip with holes."""

from __future__ import annotations

import json
import wave
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as example
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

from tests import tiny_ltx_2, tiny_ltx_video
from vgen import backbones, cli, manifest, video
from vgen import latents as kept
from vgen.checkpoints import resolve
from vgen.conditioning import clips, given
from vgen.conditioning.canvas import Canvas, known_tokens
from vgen.conditioning.frames import KnownFrames
from vgen.errors import UsageError, VgenError
from vgen.pipelines import text_to_video
from vgen.plan import Plan, plan
from vgen.request import GenerateRequest
from vgen.runtime import choose
from vgen.toyland.renderer import render
from vgen.toyland.scene import sample_clips

SMALL: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "seed": 3, "dtype": "float32"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(folder: Path | str, **changes: Any) -> Plan:
    request = GenerateRequest(**{"prompt": "a red ball", "model": str(folder), **SMALL, **changes})
    return plan(request, resolve(str(folder)))


def loaded(folder: Path | str) -> backbones.Backbone:
    return backbones.load(resolve(str(folder)), choose("cpu", "float32"))


def moving(num_frames: int, height: int = 32, width: int = 48) -> video.Frames:
    """Return a bright square on a gradient that moves right."""
    y, x = np.mgrid[:height, :width]
    frames = np.stack([np.stack([x * 4, y * 4, x + y + f], -1) for f in range(num_frames)]).clip(0, 255)
    for f, frame in enumerate(frames):
        frame[8:16, f : f + 8] = (250, 240, 20)
    return frames.astype(np.uint8)


def clip(num_frames: int) -> Path:
    video.save(moving(num_frames), Path("clip.png"), fps=8)
    return Path("clip.png")


def picture(name: str, colour: tuple[int, int, int], size: tuple[int, int] = (48, 32)) -> Path:
    Image.new("RGB", size, colour).save(name)
    return Path(name)


def hole(name: str = "mask.png", box: tuple[int, int, int, int] = (16, 0, 48, 32)) -> Path:
    mask = Image.new("L", (48, 32))
    mask.paste(255, box)
    mask.save(name)
    return Path(name)


def psnr(one: video.Frames, other: video.Frames) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.square(one.astype(float) - other).mean())))


# From pixels to known latents.


def test_a_token_is_known_only_where_all_of_its_pixels_are() -> None:
    known = np.ones((9, 32, 48), bool)
    known[6, 20, 17] = False
    expected = np.ones((3, 2, 3), bool)
    expected[2, 1, 1] = False
    np.testing.assert_array_equal(known_tokens(known, (3, 2, 3)), expected)
    known[0] = False
    assert known_tokens(known, (3, 2, 3))[1].all()
    assert not known_tokens(known, (3, 2, 3))[0].any()
    assert known_tokens(known[:1], (1, 2, 3)).shape == (1, 2, 3)


def test_cells_are_known_by_whole_tokens(tiny_expanded: Path) -> None:
    backbone, made = loaded(tiny_expanded), planned(tiny_expanded, width=48, height=32, num_frames=9)
    known = np.ones((9, 32, 48), bool)
    known[2, 3, 30] = False
    with torch.inference_mode():
        found = Canvas(frames=moving(9), known=known).encode(backbone, text_to_video.shot_of(made))
    assert found.latents.shape == (1, 16, 3, 4, 6)
    expected = torch.ones(1, 1, 3, 4, 6, dtype=torch.bool)
    expected[0, 0, 1, 0:2, 2:4] = False
    assert torch.equal(found.mask, expected)


def test_a_token_that_is_partly_known_has_the_timestep_of_the_noise(tiny_expanded: Path) -> None:
    backbone: Any = loaded(tiny_expanded)
    seen: list[torch.Tensor] = []
    backbone.transformer.register_forward_pre_hook(
        lambda module, arguments, values: seen.append(values["timestep"]), with_kwargs=True
    )
    known = torch.ones(1, 1, 3, 4, 6, dtype=torch.bool)
    known[0, 0, 1, 3, 5] = False  # the last cell of its patch, not the corner
    with torch.no_grad():
        text = backbone.encode_prompt(["a"])[0]
        backbone.velocity(torch.zeros(1, 16, 3, 4, 6), torch.tensor(0.5), text, known)
    expected = torch.zeros(3, 2, 3)
    expected[1, 1, 2] = 500
    assert torch.equal(seen[0].view(3, 2, 3), expected)


def test_frames_of_which_nothing_is_known_show_the_next_that_is() -> None:
    frames = moving(9)
    known = np.zeros(frames.shape[:3], bool)
    known[[0, 5]] = True
    filled = Canvas(frames=frames, known=known).filled()
    for index, shown in enumerate([0, 5, 5, 5, 5, 5, 5, 5, 5]):
        np.testing.assert_array_equal(filled[index], frames[shown])


def test_a_hole_is_filled_from_around_it_and_not_from_what_is_in_it() -> None:
    frames = np.full((2, 32, 48, 3), 100, np.uint8)
    known = np.ones(frames.shape[:3], bool)
    known[:, 5:20, 10:30] = False
    other = frames.copy()
    other[:, 5:20, 10:30] = 255
    np.testing.assert_array_equal(Canvas(frames=other, known=known).filled(), frames)
    made = np.random.default_rng(0).integers(0, 255, frames.shape, np.uint8)
    np.testing.assert_array_equal(
        Canvas(frames=other, known=known).paste(made), Canvas(frames=frames, known=known).paste(made)
    )


def test_what_is_pasted_is_exact_and_has_a_soft_border() -> None:
    frames, made = np.full((1, 64, 64, 3), 120, np.uint8), np.full((1, 64, 64, 3), 100, np.uint8)
    known = np.ones((1, 64, 64), bool)
    known[:, 16:48, 16:48] = False
    pasted = Canvas(frames=frames, known=known).paste(made)
    assert (pasted[known] == 120).all()
    row = pasted[0, 32, :, 0].astype(int)
    assert np.abs(np.diff(row)).max() <= 4  # where 20 would be a seam
    assert (row[26:38] == 100).all()


def test_reinjected_latents_are_as_noisy_as_the_rest() -> None:
    latents, noise = torch.full((1, 1, 2, 1, 1), 3.0), torch.full((1, 1, 2, 1, 1), -1.0)
    known = KnownFrames(latents=latents, mask=torch.tensor([True, False]).view(1, 1, 2, 1, 1))
    seen: list[torch.Tensor] = []
    velocity = known.reinjected(lambda x, sigma: seen.append(x) or x, noise)  # type: ignore[func-returns-value]
    velocity(torch.zeros(1, 1, 2, 1, 1), torch.tensor(0.25))
    assert seen[0].flatten().tolist() == [0.75 * 3 - 0.25, 0]


def test_what_is_packed_behind_the_frames_is_not_known() -> None:
    known = KnownFrames(latents=torch.ones(1, 2, 3, 4, 4), mask=torch.ones(1, 1, 3, 4, 4).bool())
    assert known.padded(3) is known
    padded = known.padded(5)
    assert padded.latents.shape == (1, 2, 5, 4, 4)
    assert padded.mask[0, 0, :, 0, 0].tolist() == [True, True, True, False, False]


# The user's clip.


@pytest.mark.parametrize(("fps", "count"), [(8, 17), (8.05, 17), (4, 8), (16, 34)])
def test_a_clip_at_another_rate_lasts_as_long_and_ends_the_same(fps: float, count: int) -> None:
    frames = clips.at_rate(video.Video(frames=moving(17), fps=8, tags={}), fps)
    assert len(frames) == count
    np.testing.assert_array_equal(frames[-1], moving(17)[-1])


def test_a_clip_is_fitted_and_it_is_said(tiny_expanded: Path) -> None:
    made = planned(tiny_expanded, video=clip(9), extend=1.0, fps=8, width=32, height=32, num_frames=9)
    assert any("edges are cut off" in note for note in made.notes)
    video.save(moving(9), Path("fast.mp4"), fps=16)
    made = planned(tiny_expanded, video=Path("fast.mp4"), extend=1.0, fps=8, num_frames=9)
    assert (made.width, made.height) == (48, 32)  # the clip's own, as the model takes it
    assert any("9 frames become 4. Tip: --fps 16" in note for note in made.notes)


@example(st.integers(1, 200), st.integers(1, 300), st.integers(1, 20), st.sampled_from([4, 8]))
def test_windows_are_enough_and_overlap_by_whole_latent_frames(
    num_given: int, num_new: int, latents: int, step: int
) -> None:
    window = latents * step + 1
    length = num_given
    overlaps = given.overlaps_of(num_given, num_new, window=window, step=step)
    for overlap in overlaps:
        assert overlap % step == 1
        assert 1 <= overlap <= min(length, window - step)
        assert length < num_given + num_new
        length += window - overlap
    assert length >= num_given + num_new


def test_a_shift_of_colour_is_taken_off() -> None:
    true = moving(5).clip(20, 230)
    shift = np.array([4, -3, 2])
    decoded, new = (true + shift).astype(np.uint8), (true[::-1] + shift).astype(np.uint8)
    np.testing.assert_array_equal(given.matched(new, decoded, true), true[::-1])


# What is made.


def test_a_clip_goes_on_exactly_from_where_it_ends(tiny_expanded: Path) -> None:
    made = planned(tiny_expanded, video=clip(7), extend=1.5, num_frames=9, fps=8)
    assert "12 frames (1.5 s) go behind the 7 of the clip, in 2 windows of 9 frames." in made.notes
    backbone = loaded(tiny_expanded)
    steps: list[tuple[int, int]] = []
    saved: list[torch.Tensor] = []
    generation = text_to_video.generate(
        made, backbone, on_step=lambda i, n: steps.append((i, n)), save_latents=saved.append
    )
    assert generation.frames.shape == (19, 32, 48, 3)
    np.testing.assert_array_equal(generation.frames[:7], moving(7))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [len(latents) for latents in saved] == [1, 2]
    # The window begins with the last frame as the VAE has it, and the second with what the first has made.
    with torch.inference_mode():
        first = backbone.encode_frames(torch.from_numpy(moving(7)[-1:])[None])
        second = backbone.encode_frames(torch.from_numpy(generation.frames[14:15])[None])
    assert torch.allclose(generation.latents[0, :, 0], first[0, :, 0], atol=1e-4)
    assert torch.allclose(generation.latents[1, :, 0], second[0, :, 0], atol=1e-4)
    assert generation.frames[7:].std() > 1


def test_a_finished_clip_can_be_decoded_again(tiny_expanded: Path) -> None:
    made = planned(tiny_expanded, video=clip(7), extend=1.5, num_frames=9, fps=8)
    backbone, path = loaded(tiny_expanded), Path("latents.safetensors")
    generation = text_to_video.generate(made, backbone, save_latents=lambda latents: kept.save(path, latents, made))
    np.testing.assert_array_equal(text_to_video.decode_latents(path, backbone).frames, generation.frames)


@pytest.mark.parametrize("num_frames", [9, 7])  # 7 are shown in a window of 9
def test_completion_keeps_what_is_outside_of_the_mask(num_frames: int, tiny_expanded: Path) -> None:
    given_values: dict[str, Any] = {"video": clip(num_frames), "mask": hole(), "missing": "5-6"}
    made, backbone = planned(tiny_expanded, **given_values), loaded(tiny_expanded)
    assert made.num_frames == 9
    generation = text_to_video.generate(made, backbone)
    true = moving(num_frames)
    assert generation.frames.shape == true.shape
    kept = [f for f in range(num_frames) if f not in (5, 6)]
    np.testing.assert_array_equal(generation.frames[kept][:, :, :16], true[kept][:, :, :16])
    assert psnr(generation.frames[:, :, 32:], true[:, :, 32:]) < 40
    assert psnr(generation.frames[5:7], true[5:7]) < 40
    other = text_to_video.generate(planned(tiny_expanded, **given_values, seed=4), backbone).latents
    same = (generation.latents == other)[0].all(0)
    assert same[0, :, :2].all()
    assert not same[0, :, 2:].any()


def test_pictures_come_back_as_the_vae_has_them() -> None:
    (scene,) = islice(sample_clips(11), 1)
    truth = render([scene], num_frames=17, height=64, width=64, fps=8).frames[0].numpy()
    for frame in (0, 8, 16):
        Image.fromarray(truth[frame]).save(f"{frame}.png")
    made = planned(
        "toyland",
        width=64,
        height=64,
        image=Path("0.png"),
        interpolate=("8.png@8",),
        last_image=Path("16.png"),
        num_inference_steps=4,
    )
    assert any("8.png stands still at frames 5 to 8" in note for note in made.notes)
    backbone = loaded("toyland")
    frames = text_to_video.generate(made, backbone).frames
    with torch.inference_mode():
        for frame in (0, 8, 16):
            still = torch.from_numpy(truth[frame]).expand(1, 17, -1, -1, -1)
            decoded = backbone.decode(backbone.encode_frames(still), text_to_video.shot_of(made))[0, frame].numpy()
            # Not the same, because the decoder sees the frames before. Without the pictures there are 13 dB.
            assert psnr(frames[frame], decoded) > 35, frame


def test_a_last_image_needs_no_first(tiny_expanded: Path) -> None:
    last: dict[str, Any] = {"last_image": picture("last.png", (200, 30, 30)), "num_frames": 5}
    backbone = loaded(tiny_expanded)
    one, other = (
        text_to_video.generate(planned(tiny_expanded, width=48, height=32, seed=seed, **last), backbone).latents
        for seed in (1, 2)
    )
    assert torch.equal(one[:, :, 1], other[:, :, 1])
    assert not torch.equal(one[:, :, 0], other[:, :, 0])


def test_reinjection_serves_a_model_without_known_frames(tiny_checkpoint: Path) -> None:
    values: dict[str, Any] = {"video": clip(5), "extend": 0.5, "num_frames": 9, "fps": 8}
    with pytest.raises(UsageError, match="not trained to") as caught:
        planned(tiny_checkpoint, **values)
    assert "--known-frames reinject" in str(caught.value.tip)
    made = planned(tiny_checkpoint, **values, known_frames="reinject")
    backbone = loaded(tiny_checkpoint)
    generation = text_to_video.generate(made, backbone)
    np.testing.assert_array_equal(generation.frames[:5], moving(5))
    with torch.inference_mode():
        first = backbone.encode_frames(torch.from_numpy(moving(5)[-1:])[None])
    assert torch.allclose(generation.latents[0, :, 0], first[0, :, 0], atol=1e-4)


@pytest.mark.parametrize("family", [tiny_ltx_video, tiny_ltx_2])
def test_other_families_with_a_timestep_per_token_take_them(family: Any, tmp_path: Path) -> None:
    folder = family.build(tmp_path / "checkpoint")
    picture("last.png", (200, 30, 30), (64, 64))
    video.save(moving(17, 64, 64), Path("clip.png"), fps=8)
    backbone = loaded(folder)
    small: dict[str, Any] = {"num_frames": 17, "width": 64, "height": 64, "fps": 8}
    uses: list[tuple[dict[str, Any], list[int]]] = [
        ({"last_image": Path("last.png")}, [2]),
        ({"video": Path("clip.png"), "missing": "12"}, [0, 1]),
    ]
    for changes, known in uses:
        one, other = (
            text_to_video.generate(planned(folder, **small, **changes, seed=seed), backbone) for seed in (1, 2)
        )
        same = (one.latents == other.latents)[0].all(0).flatten(1).all(1)
        assert [index for index, held in enumerate(same[:3]) if held] == known
        assert not same[3:].any()  # the sound, where there is one
        assert (one.sound is not None) == (family is tiny_ltx_2 and "video" not in changes)


# What is refused, and what is recorded.


@pytest.mark.parametrize(
    ("changes", "message", "tip"),
    [
        ({"video": "nowhere.mp4", "extend": 1.0}, "There is no video nowhere.mp4", "check the path"),
        ({"video": "text.mp4", "extend": 1.0}, "cannot be read as a video", "ffmpeg reads"),
        ({"video": "sound.wav", "extend": 1.0}, "it has no picture", "ffmpeg reads"),
        ({"video": "bomb", "extend": 1.0}, "Cannot read the frames in bomb", "PNGs that are whole"),
        ({"video": "empty", "extend": 1.0}, "holds no .png files", "a folder of frames"),
        ({"video": "clip.png"}, "nothing to do with it", "--extend SECONDS"),
        ({"extend": 1.0}, "--extend is for a video", "--video CLIP"),
        ({"mask": "mask.png"}, "--mask is for a video", "--video CLIP"),
        ({"video": "clip.png", "extend": 1.0, "missing": "1"}, "Both --extend and --missing", "one after the other"),
        ({"video": "clip.png", "extend": -1.0}, "cannot go on for -1 seconds", "--extend 2"),
        ({"video": "clip.png", "extend": float("nan")}, "cannot go on for nan seconds", "--extend 2"),
        ({"video": "clip.png", "extend": 1e12}, "1e+12 more seconds do not fit", "a shorter --extend"),
        ({"video": "clip.png", "extend": 1.0, "seconds": 2.0}, "Both --seconds and --extend", "how long"),
        ({"video": "clip.png", "extend": 1.0, "num_frames": 1}, "no room to go on in", "--frames 5"),
        ({"video": "clip.png", "extend": 1.0, "image": "a.png"}, "Both a video and images", "leave out"),
        ({"video": "clip.png", "mask": "text.mp4"}, "Cannot read the image text.mp4", "PNG"),
        ({"video": "clip.png", "mask": "black.png"}, "it leaves nothing to make", "white"),
        ({"video": "clip.png", "missing": "0-8"}, "Nothing of the clip is left", "--missing"),
        ({"video": "clip.png", "missing": "5-9"}, "There are no frames 5-9 in a clip of 9", "from 0 to 8"),
        ({"video": "clip.png", "missing": "6-5"}, "There are no frames 6-5", "lower number first"),
        ({"video": "clip.png", "missing": "five"}, '"five" is no list of frames', "--missing 5-12"),
        ({"interpolate": ("a.png",)}, '"a.png" does not say which image', "picture.png@8"),
        ({"interpolate": ("no.png@4",)}, "There is no image no.png", "check the path"),
        ({"interpolate": ("a.png@7",)}, "An image at frame 7 is not legal", "use @4 or @8."),
        ({"interpolate": ("a.png@40",)}, "takes multiples of 4 from 0 to 16", "use @16, or --frames 41"),
        ({"interpolate": ("a.png@0",), "image": "a.png"}, "Two images are given for frame 0", "each frame one"),
        ({"known_frames": "guess", "image": "a.png"}, 'no way "guess"', "timesteps or reinject"),
        ({"known_frames": "reinject"}, "how frames are given, and there are none", "--image"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_fix(changes: dict[str, Any], message: str, tip: str) -> None:
    clip(9)
    hole()
    picture("a.png", (1, 2, 3), (128, 128))
    picture("black.png", (0, 0, 0))
    Path("text.mp4").write_text("no video")
    Path("empty").mkdir()
    with wave.open("sound.wav", "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    Path("bomb").mkdir()
    Path("bomb/0.png").write_bytes(b"P4\n30000 30000\n")  # a header is all that it takes
    paths = {key: Path(value) if key in ("video", "mask", "image") else value for key, value in changes.items()}
    with pytest.raises(UsageError) as caught:
        planned("toyland", **paths)
    assert message in caught.value.message
    assert tip in str(caught.value.tip)


def test_a_plan_goes_through_json_and_plans_to_itself(tiny_expanded: Path) -> None:
    for changes in (
        {"video": clip(7), "extend": 1.0, "num_frames": 9},
        {"video": Path("clip.png"), "mask": hole(), "missing": "3"},
        {"image": picture("a.png", (1, 2, 3)), "interpolate": ("a.png@4", "a.png@8"), "num_frames": 9},
    ):
        made = planned(tiny_expanded, width=48, height=32, **changes)
        again = GenerateRequest.from_dict(json.loads(json.dumps(made.to_dict())))
        assert plan(again, made.checkpoint) == made
    with pytest.raises(UsageError, match="a list of texts is expected"):
        GenerateRequest.from_dict({"prompt": "a", "interpolate": "a.png@4"})


def vgen(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["generate", *arguments])


def test_the_command_line_records_what_was_given_and_runs_it_again(
    tiny_expanded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip(5)
    small = ["--model", str(tiny_expanded), "--steps", "1", "--frames", "9", "--fps", "8", "--dtype", "float32"]
    result = vgen("it moves", *small, "--video", "clip.png", "--extend", "0.5", "-o", "one.png")
    assert result.exit_code == 0, result.stderr
    assert "4 frames (0.5 s) go behind the 5 of the clip" in result.stderr
    one = video.read(Path("one.png")).frames
    np.testing.assert_array_equal(one[:5], moving(5))
    assert len(one) == 9
    recorded = manifest.read(Path("one.png"))
    assert recorded["request"]["video"] == str(Path("clip.png").absolute())
    assert recorded["video_sha256"]

    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert vgen("--from", "../one.png", "-o", "two.png").exit_code == 0
    np.testing.assert_array_equal(video.read(Path("two.png")).frames, one)
    video.save(moving(5) // 2, Path("../clip.png"), fps=8)
    again = vgen("--from", "../one.png", "-o", "three.png")
    assert again.exit_code == 1
    assert "changed since the video was made" in again.stderr
    assert "--video" in again.stderr


def test_a_line_of_a_prompt_file_has_frames_of_its_own(tiny_expanded: Path) -> None:
    picture("a.png", (200, 30, 30))
    picture("b.png", (30, 30, 200))
    clip(5)
    hole()
    lines = [
        {"prompt": "a", "interpolate": ["a.png@0", "b.png@4"], "frames": 5, "width": 48, "height": 32},
        {"prompt": "b", "video": "clip.png", "mask": "mask.png"},
        {"prompt": "c", "video": "clip.png", "missing": "7"},
    ]
    Path("p.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    small = ["--model", str(tiny_expanded), "--steps", "1", "--dtype", "float32"]
    result = vgen("--prompts", "p.jsonl", *small, "-o", "c.png", "--format", "json")
    assert result.exit_code == 1
    printed = json.loads(result.stdout)
    assert printed["outputs"] == ["c-1.png", "c-2.png"]
    assert [failure["line"] for failure in printed["failures"]] == [3]
    recorded = manifest.read(Path("c-1.png"))
    assert [Path(text).name for text in recorded["request"]["interpolate"]] == ["a.png@0", "b.png@4"]
    assert len(recorded["interpolate_sha256"]) == 64
    picture("b.png", (0, 0, 0))
    with pytest.raises(VgenError, match="An image of --interpolate has changed"):
        manifest.request(recorded, {})
