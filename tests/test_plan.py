from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from tests.strategies import requests
from vgen.checkpoints import Capabilities, Checkpoint, resolve
from vgen.errors import UsageError
from vgen.legal import MAX_SEED
from vgen.plan import plan
from vgen.request import GenerateRequest


def toyland() -> Checkpoint:
    return resolve("toyland")


def planned(**changes: Any) -> Any:
    return plan(GenerateRequest(**{"prompt": "a red ball", **changes}), toyland())


def test_what_is_not_given_comes_from_the_checkpoint() -> None:
    made = planned()
    defaults = toyland().defaults
    for name in ("width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "sampler"):
        assert getattr(made, name) == getattr(defaults, name)
    assert made.negative_prompt == ""
    assert made.notes == ()
    assert 0 <= made.seed < 2**32


def test_what_is_given_wins() -> None:
    given_values: dict[str, Any] = {
        "negative_prompt": "blue",
        "seed": 5,
        "num_inference_steps": 3,
        "guidance_scale": 1.5,
        "width": 64,
        "height": 96,
        "num_frames": 5,
        "fps": 12,
        "sampler": "heun",
    }
    made = planned(**given_values)
    assert {name: getattr(made, name) for name in given_values} == given_values


def test_seeds_are_drawn_anew() -> None:
    assert planned().seed != planned().seed


@pytest.mark.parametrize(
    ("changes", "message", "tip"),
    [
        ({"width": 130}, "A width of 130 is not legal", "use --width 128 or --width 144."),
        ({"height": 100}, "A height of 100 is not legal", "use --height 96 or --height 112."),
        ({"width": 0}, "A width of 0 is not legal", "use --width 16."),
        ({"height": -5}, "A height of -5 is not legal", "use --height 16."),
        ({"width": 10**9}, "A width of 1000000000 is not legal", "use --width 16384."),
        ({"width": 10**400}, "is not legal", "use --width 16384."),
        ({"num_frames": -(10**400)}, "frames are not legal", "use --frames 1."),
        ({"num_frames": 16}, "16 frames are not legal", "use --frames 13 or --frames 17."),
        ({"num_frames": 0}, "0 frames are not legal", "use --frames 1."),
        ({"seconds": 0.0}, "0 seconds are not legal", "use --seconds"),
        ({"seconds": float("nan")}, "nan seconds are not legal", "use --seconds"),
        ({"seconds": 1e9}, "1e+09 seconds are not legal", "use --seconds"),
        ({"seconds": 2.0, "num_frames": 17}, "Both frames and seconds", "use --frames or --seconds"),
        ({"fps": 0.0}, "0 frames per second", "from 0.001 to 1000"),
        ({"fps": 1e-9}, "1e-09 frames per second", "from 0.001 to 1000"),
        ({"fps": float("nan")}, "nan frames per second", "from 0.001 to 1000"),
        ({"fps": float("inf")}, "inf frames per second", "from 0.001 to 1000"),
        ({"gpus": 10**9, "context_parallel": "unified"}, "on 1000000000 GPUs", "--gpus 2"),
        ({"seed": -1}, "A seed of -1", f"from 0 to {MAX_SEED}"),
        ({"seed": MAX_SEED + 1}, "A seed of", f"from 0 to {MAX_SEED}"),
        ({"num_inference_steps": 0}, "0 steps are not legal", "from 1 to 1000"),
        ({"guidance_scale": float("nan")}, "A guidance scale of nan", "choose 1"),
        ({"guidance_interval": "0.8"}, '"0.8" is no interval of noise levels', "LOW-HIGH"),
        ({"guidance_interval": "1-0.8"}, '"1-0.8" is no interval', "such as 0.8-1"),
        ({"guidance_interval": "0-5"}, '"0-5" is no interval', "from 0 (a clean video) to 1"),
        ({"guidance_interval": "nan-1"}, '"nan-1" is no interval', "0-1 is guidance everywhere"),
        (
            {"sampler": "eular"},
            'no sampler "eular". Did you mean "euler"?',
            "choose one of: euler, heun, dpm++, rf-solver, fireflow, lcm, native.",
        ),
        ({"sampler": "heun:x=1"}, 'The sampler "heun" has no option "x"', 'it takes no options: write "heun".'),
        ({"device": "gpu"}, 'no device "gpu"', "choose one of"),
        ({"device": "cuda:x"}, 'no device "cuda:x"', "cuda:1"),
        ({"device": "cuda:²"}, 'no device "cuda:²"', "cuda:1"),
        ({"dtype": "bfloat"}, 'no dtype "bfloat". Did you mean "bfloat16"?', "choose one of"),
        ({"prompt": " \n\t"}, "The prompt is empty", "say what to show"),
        ({"image": Path("nowhere.png")}, "There is no image nowhere.png", "check the path"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_fix(changes: dict[str, Any], message: str, tip: str) -> None:
    with pytest.raises(UsageError) as caught:
        planned(**changes)
    assert message in caught.value.message
    assert caught.value.tip is not None
    assert tip in caught.value.tip


def test_an_interval_without_guidance_is_told_to_change_nothing() -> None:
    made = planned(guidance_interval="0.8-1", guidance_scale=1.0)
    assert made.notes == ("--guidance-interval changes nothing: at a scale of 1 there is no guidance.",)
    assert planned(guidance_interval="0.8-1", guidance_scale=3.0).notes == ()


def test_an_unreadable_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("no image")
    with pytest.raises(UsageError, match="Cannot read the image"):
        planned(image=path)
    with pytest.raises(UsageError, match=r"Cannot read the image .*: Is a directory"):
        planned(image=tmp_path)


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    assert planned(image=whole).image == whole
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(UsageError, match="Cannot read the image"):
        planned(image=cut)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_damaged_avif_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.avif"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes().replace(b"av01", b"av99"))
    with pytest.raises(UsageError, match="Cannot read the image"):
        planned(image=path)


def test_a_model_that_cannot_start_from_an_image_takes_none(tmp_path: Path) -> None:
    checkpoint = toyland()
    checkpoint = replace(checkpoint, can=Capabilities(text_to_video=True))
    with pytest.raises(UsageError, match="cannot start from an image"):
        plan(GenerateRequest(prompt="a", image=tmp_path / "first.png"), checkpoint)


def test_a_whole_number_of_any_length_is_a_number() -> None:
    """As Python's JSON reads it: a float of that size there is not."""
    request = GenerateRequest.from_dict({"prompt": "a", "fps": 10**400})
    with pytest.raises(UsageError, match="inf frames per second"):
        plan(request, toyland())


def test_a_model_that_always_starts_from_an_image_takes_nothing_else() -> None:
    checkpoint = replace(toyland(), can=Capabilities(image_to_video=True))
    with pytest.raises(UsageError, match="makes videos from a first image, and none is given"):
        plan(GenerateRequest(prompt="a"), checkpoint)


def test_a_model_of_one_size_names_it() -> None:
    checkpoint = replace(toyland(), rules=replace(toyland().rules, fixed_size=True), sizes=((128, 128),))
    assert plan(GenerateRequest(prompt="a"), checkpoint).width == 128
    with pytest.raises(UsageError, match="A size of 144x128 is not legal") as caught:
        plan(GenerateRequest(prompt="a", width=144), checkpoint)
    assert "--width 128 --height 128" in str(caught.value.tip)


def test_the_rounding_of_seconds_is_stated() -> None:
    made = planned(seconds=3.0, fps=8)
    assert made.num_frames == 25
    assert made.notes == (
        "3 s at 8 frames per second are 24 frames; rounded to 25, the nearest legal number (3.125 s).",
    )
    exact = planned(seconds=2.125, fps=8)
    assert (exact.num_frames, exact.notes) == (17, ())


@given(st.integers(-(10**6), 10**6))
def test_a_size_is_taken_or_its_two_nearest_legal_neighbours_are_named(value: int) -> None:
    rules = toyland().rules
    legal = value % 16 == 0 and 16 <= value <= rules.max_size
    try:
        made = planned(width=value)
    except UsageError as error:
        assert not legal
        named = [int(word.rstrip(".")) for word in str(error.tip).split() if word.rstrip(".").isdigit()]
        assert all(near % 16 == 0 and 16 <= near <= rules.max_size for near in named)
        if 16 < value < rules.max_size:
            assert [value - value % 16, value - value % 16 + 16] == named
    else:
        assert legal
        assert made.width == value


@given(st.integers(-10, 5000))
def test_a_frame_count_is_taken_or_its_nearest_legal_neighbours_are_named(value: int) -> None:
    try:
        made = planned(num_frames=value)
    except UsageError as error:
        assert value % 4 != 1 or not 1 <= value <= 4093
        assert "--frames" in str(error.tip)
    else:
        assert made.num_frames == value
        assert value % 4 == 1


@given(st.floats(0.01, 100), st.sampled_from([1, 7.5, 8, 16, 23.976, 30]))
def test_seconds_become_the_nearest_legal_frame_count(seconds: float, fps: float) -> None:
    made = planned(seconds=seconds, fps=fps)
    assert made.num_frames % 4 == 1
    assert abs(made.num_frames - seconds * fps) <= 2 or made.num_frames == 1
    assert bool(made.notes) == (made.num_frames != seconds * fps)


@given(requests)
def test_a_plan_goes_through_json_and_plans_to_itself(request: GenerateRequest) -> None:
    request = replace(request, image=None)
    if not request.prompt.strip():
        request = replace(request, prompt="a")
    made = plan(request, toyland())
    again = GenerateRequest.from_dict(json.loads(json.dumps(made.to_dict())))
    assert plan(again, toyland()) == made


@given(st.text())
def test_any_prompt_is_kept_as_it_is_or_refused_as_empty(prompt: str) -> None:
    if prompt.strip():
        assert planned(prompt=prompt).prompt == prompt
    else:
        with pytest.raises(UsageError, match="The prompt is empty"):
            planned(prompt=prompt)
