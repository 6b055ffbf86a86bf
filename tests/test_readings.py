"""Readings without learning agree with what the renderer knows."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch

from vgen.toyland import readings
from vgen.toyland.prompts import even_clips
from vgen.toyland.renderer import render
from vgen.toyland.scene import Clip, Subject

BALL = Subject(shape="ball", colour="red", size="large", actions=((0.0, "stays"),), place=(0.0, 0.0), heading=0.0)
STILL = Clip(scene="grass", subjects=(BALL,), camera="static", layout=11)


def test_scene_colour_and_place_of_solids() -> None:
    clips = [clip for clip in islice(even_clips(5), 35) if clip.subjects[0].shape != "head"]
    rendered = render(clips, num_frames=3, fps=1, height=96, width=96)
    scenes, colours, off = [], [], []
    for index, clip in enumerate(clips):
        frames, colour = rendered.frames[index], clip.subjects[0].colour
        scenes.append(readings.scene(frames) == clip.scene)
        colours.append(readings.colour(frames) == colour)
        away = (readings.centroids(frames, colour) - rendered.pixel_tracks[index, 0]).norm(dim=1)
        off.append(float(away.nanmedian()))
    assert sum(scenes) == len(clips)
    assert sum(colours) >= 0.9 * len(clips)
    assert torch.tensor(off).nanmedian() < 2, "pixels of 96; a cone has its mass below its middle"


def test_displacement_by_centroid() -> None:
    clip = replace(STILL, subjects=(replace(BALL, actions=((0.0, "moves left"),), place=(1.1, 0.0)),))
    rendered = render([clip], num_frames=5, fps=2)
    moved = readings.centroids(rendered.frames[0], "red")
    true = rendered.pixel_tracks[0, 0]
    assert torch.allclose(moved[-1] - moved[0], true[-1] - true[0], atol=2)


def test_nothing_stands_out_of_an_empty_scene() -> None:
    away = replace(STILL, subjects=(replace(BALL, place=(1e3, 1e3)),))
    assert readings.colour(render([away], num_frames=2).frames[0]) is None


@pytest.mark.parametrize("camera", ["static", "pan left", "tilt up", "roll"])
def test_turns_of_the_camera_agree_with_the_extrinsics(camera: str) -> None:
    rendered = render([replace(STILL, camera=camera)], num_frames=9)
    found = readings.camera_motion(rendered.frames[0])
    true = readings.turn_of(rendered.extrinsics[0, 0], rendered.extrinsics[0, -1])
    assert (found.pan, found.tilt, found.roll) == pytest.approx(true, abs=2.5)
    assert max(map(abs, true)) > 8 or camera == "static"


def test_dollies_zoom() -> None:
    for camera, least in (("dolly in", 1.05), ("dolly out", 0)):
        zoom = readings.camera_motion(render([replace(STILL, camera=camera)], num_frames=9).frames[0]).zoom
        assert least < zoom < (2 if least else 0.95)


def test_flicker_is_of_light_and_not_of_movement() -> None:
    moving = render([replace(STILL, camera="pan left")]).frames[0]
    lit = moving.float() * (1 + 0.1 * (torch.arange(17) % 2)).view(-1, 1, 1, 1)
    assert readings.flicker(moving) < 0.01
    assert readings.flicker(lit.clamp(max=255).byte()) > 3 * readings.flicker(moving)
    assert readings.flicker(moving[:2]) == 0
