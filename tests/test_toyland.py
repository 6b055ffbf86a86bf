"""The rendered world: what is drawn is what the truth says, and captions name it."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vgen.toyland import captions, motion, solids
from vgen.toyland.renderer import FAR, render
from vgen.toyland.scene import (
    ACTIONS,
    CAMERAS,
    COLOURS,
    IDENTITY_SIZE,
    SCENES,
    SHAPES,
    Clip,
    Subject,
    sample_clips,
)

BALL = Subject(shape="ball", colour="red", size="large", actions=((0.0, "stays"),), place=(0.0, 0.0), heading=0.0)
STILL = Clip(scene="grass", subjects=(BALL,), camera="static", layout=11)


def acting(action: str, camera: str = "static") -> Clip:
    return replace(STILL, subjects=(replace(BALL, actions=((0.0, action),)),), camera=camera)


def test_the_same_clip_renders_to_the_same_frames_alone_and_in_a_batch() -> None:
    clips = list(islice(sample_clips(5), 3))
    together = render(clips, num_frames=5, height=48, width=48)
    for index, clip in enumerate(clips):
        alone = render([clip], num_frames=5, height=48, width=48)
        assert torch.equal(alone.frames[0], together.frames[index])
        assert torch.equal(alone.masks[0], together.masks[index])


def test_a_clip_can_be_continued() -> None:
    clip = acting("circles", "wander")
    whole = render([clip], num_frames=9, height=32, width=32)
    rest = render([clip], num_frames=4, height=32, width=32, start=5 / 8)
    assert torch.equal(whole.frames[0, 5:], rest.frames[0])


@pytest.mark.parametrize(("height", "width", "num_frames"), [(17, 31, 1), (64, 96, 2)])
def test_any_size_and_length(height: int, width: int, num_frames: int) -> None:
    rendered = render([STILL], num_frames=num_frames, height=height, width=width)
    assert rendered.frames.shape == (1, num_frames, height, width, 3)
    assert rendered.depth.shape == (1, num_frames, height, width)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_lies_round_its_track_and_shows_the_colour(shape: str) -> None:
    clip = replace(STILL, subjects=(replace(BALL, shape=shape),))
    rendered = render([clip], num_frames=1, height=96, width=96)
    mask = rendered.masks[0, 0, 0].float() / 255
    rows, columns = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    centroid = torch.stack([(mask * columns).sum(), (mask * rows).sum()]) / mask.sum()
    assert mask.sum() > 100
    across, along = (centroid - rendered.pixel_tracks[0, 0, 0]).abs().tolist()
    assert across < 1 and along < 9, "a cone has its mass below its middle"
    inside = rendered.frames[0, 0][mask == 1].float().mean(0)
    assert inside[0] > 1.8 * inside[1:].max(), "a red solid looks red"
    assert rendered.masks[0, 1].max() == 0, "there is no second subject"


def test_depth_of_a_ball_is_its_track_less_its_radius() -> None:
    rendered = render([STILL], num_frames=1, height=128, width=128)
    x, y = rendered.pixel_tracks[0, 0, 0].long()
    centre = rendered.extrinsics[0, 0] @ torch.cat([rendered.tracks[0, 0, 0], torch.ones(1)])
    assert rendered.depth[0, 0, y, x] == pytest.approx(float(centre[2]) - 0.98, abs=0.02)
    assert rendered.depth[0, 0, 0, 0] == FAR


def test_each_action_moves_as_it_says() -> None:
    seconds = torch.linspace(0, 2, 17)
    moved = {action: torch.stack(motion.displacement(action, seconds)) for action in ACTIONS}
    assert moved["stays"].abs().max() == 0
    assert moved["moves left"][0, -1] < -1.5 and moved["moves right"][0, -1] > 1.5
    assert moved["comes closer"][2, -1] > 1.5 and moved["goes away"][2, -1] < -1.5
    assert moved["jumps"][1].max() > 0.8 and moved["jumps"][1].min() >= 0
    assert moved["spins"][3, -1] > math.pi
    assert (moved["rises"][1].diff() > 0).all() and (moved["falls"][1].diff() < 0).all()
    circle = moved["circles"][[0, 2]] + torch.tensor([[0.0], [motion.CIRCLE_RADIUS]])
    assert torch.allclose(circle.norm(dim=0), torch.full((17,), motion.CIRCLE_RADIUS), atol=1e-6)


def test_a_script_goes_on_from_where_the_first_action_ended() -> None:
    script = replace(BALL, actions=((0.0, "moves right"), (1.0, "jumps")))
    x, lift, _, _ = motion.subject_track(script, torch.tensor([0.0, 0.5, 1.0, 1.5, 2.5]))
    assert x.tolist() == pytest.approx([0.0, 0.55, 1.1, 1.1, 1.1])
    assert lift.tolist() == pytest.approx([0.0, 0.0, 0.0, motion.JUMP_HEIGHT, motion.JUMP_HEIGHT])


# How the ball's picture moves over two seconds, (right, down) in pixels of 128: the camera's move is the opposite.
@pytest.mark.parametrize(
    ("camera", "right", "down"),
    [
        ("pan left", 1, 0),
        ("pan right", -1, 0),
        ("tilt up", 0, 1),
        ("tilt down", 0, -1),
        ("truck left", 1, 0),
        ("truck right", -1, 0),
    ],
)
def test_camera_moves_shift_the_picture(camera: str, right: int, down: int) -> None:
    track = render([acting("stays", camera)], num_frames=17, height=128, width=128).pixel_tracks[0, 0]
    shift = track[-1] - track[0]
    for moved, direction in zip(shift.tolist(), (right, down), strict=True):
        assert moved * direction > 25 if direction else abs(moved) < 8


def test_dollies_change_the_size_and_orbits_keep_the_distance() -> None:
    def distances(camera: str) -> torch.Tensor:
        rendered = render([acting("stays", camera)], num_frames=17, height=16, width=16)
        eye = -(rendered.extrinsics[0, :, :3, :3].mT @ rendered.extrinsics[0, :, :3, 3:])[..., 0]
        return (eye * torch.tensor([1.0, 0.0, 1.0])).norm(dim=1)

    assert distances("dolly in")[-1] < distances("dolly in")[0] - 2
    assert distances("dolly out")[-1] > distances("dolly out")[0] + 2
    for camera in ("orbit left", "orbit right"):
        assert distances(camera).std() < 1e-4


@pytest.mark.parametrize("camera", CAMERAS)
def test_extrinsics_are_rigid(camera: str) -> None:
    rotation = motion.camera_track(acting("stays", camera), torch.linspace(0, 4, 9))[:, :3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand(9, 3, 3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(9), atol=1e-5)


@pytest.mark.parametrize("name", sorted(solids.INTERSECT))
def test_hits_lie_on_the_solid_and_normals_face_the_ray(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    origin = torch.nn.functional.normalize(torch.randn(3, 1, 4000, generator=generator), dim=0) * 3
    aim = torch.rand(3, 1, 4000, generator=generator) * 3 - 1.5
    distance, normal = solids.INTERSECT[name](origin, aim - origin)
    hit = distance.isfinite()
    assert 0.2 < hit.float().mean() < 1
    point = (origin + distance.nan_to_num(posinf=0.0) * (aim - origin))[:, hit]
    assert point.abs().max() < 1.02
    facing = (normal[:, hit] * (aim - origin)[:, hit]).sum(0) <= 1e-4
    assert facing.float().mean() > (0.97 if name == "ring" else 0.999), "a ring is walked to, and its rim is grazed"
    nudged = solids.INTERSECT[name](origin[:, :, :], 0.999 * distance.nan_to_num(posinf=1.0) * (aim - origin))[0]
    assert (nudged[hit] > 1).float().mean() > 0.95, "nothing of the solid lies before its hit"


def test_identities_differ_and_stay() -> None:
    rng = random.Random(0)
    first, second = (tuple(rng.random() for _ in range(IDENTITY_SIZE)) for _ in range(2))
    head = replace(BALL, shape="head", identity=first)

    def look(subject: Subject) -> torch.Tensor:
        rendered = render([replace(STILL, subjects=(subject,))], num_frames=1, height=64, width=64)
        return rendered.frames.float()

    assert torch.equal(look(head), look(head))
    assert (look(head) - look(replace(head, identity=second))).abs().max() > 60


def test_captions_name_what_is_there_in_words_that_the_tokenizer_knows() -> None:
    known, rng = set(captions.words()), random.Random(4)
    for clip in islice(sample_clips(9), 300):
        for length in captions.LENGTHS:
            text = captions.caption(clip, rng, length)
            assert set(re.findall(r"\w+|[^\w\s]", text)) <= known, text
            for subject in clip.subjects:
                assert any(word in text for word in captions.COLOUR_WORDS[subject.colour]), text
                assert any(word in text for word in captions.SHAPE_WORDS[subject.shape]), text


def test_every_attribute_is_sampled() -> None:
    clips = list(islice(sample_clips(1), 600))
    subjects = [subject for clip in clips for subject in clip.subjects]
    assert {clip.scene for clip in clips} == set(SCENES)
    assert {clip.camera for clip in clips} == set(CAMERAS)
    assert {subject.action for subject in subjects} == set(ACTIONS)
    assert {subject.colour for subject in subjects} == set(COLOURS)
    assert {subject.shape for subject in subjects} == {*SHAPES, "head"}
    assert len({subject.identity for subject in subjects if subject.identity}) > 50


def test_render_command_writes_clips_truth_and_a_sheet(tmp_path: Path) -> None:
    from vgen.cli import app

    folder = tmp_path / "clips"
    command = ["toyland", "render", "-n", "2", "--width", "48", "--height", "32", "--frames", "5", "-o", str(folder)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    names = {path.name for path in folder.iterdir()}
    assert names >= {"000.mp4", "000.npz", "000.json", "001.mp4", "001.npz", "001.json", "sheet.png"}
    facts = json.loads((folder / "001.json").read_text())
    assert set(facts["captions"]) == set(captions.LENGTHS)
    truth = np.load(folder / "001.npz")
    assert truth["masks"].shape == (2, 5, 32, 48) and truth["extrinsics"].shape == (5, 4, 4)
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1 and "exists" in again.output
    thesis = folder / "thesis.doc"
    thesis.touch()
    refused = CliRunner().invoke(app, [*command, "--force"])
    assert refused.exit_code == 1 and "other things than clips" in refused.output
    thesis.unlink()
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
