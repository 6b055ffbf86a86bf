"""The shipped probes on renders whose truth is known: they read it, and are not fooled."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from vgen.errors import CheckpointError, UsageError
from vgen.toyland import probes
from vgen.toyland.probes import NUM_FRAMES, SECONDS, SIDE, Probes, Readings
from vgen.toyland.prompts import ATTRIBUTES, even_clips, truth
from vgen.toyland.renderer import render
from vgen.toyland.scene import Clip

FPS = (NUM_FRAMES - 1) / SECONDS
SEED = 77
# What the shipped probes read right of sharp renders at the least, by benchmarks/probes.py, less what chance may take
# from so few clips.
LEAST = {"scene": 0.95, "colour": 0.95, "size": 0.95, "shape": 0.92, "action": 0.9, "camera": 0.95}


@pytest.fixture(scope="module")
def shipped() -> Probes:
    return probes.load()


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return list(islice(even_clips(SEED), 26))


@pytest.fixture(scope="module")
def videos(clips: list[Clip]) -> list[torch.Tensor]:
    return list(render(clips, num_frames=NUM_FRAMES, fps=FPS).frames)


@pytest.fixture(scope="module")
def found(shipped: Probes, videos: list[torch.Tensor]) -> list[Readings]:
    return shipped.read(videos, FPS)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_probes_read_held_out_renders(attribute: str, found: list[Readings], clips: list[Clip]) -> None:
    right = [one[attribute] == truth(clip)[attribute] for one, clip in zip(found, clips, strict=True)]
    assert sum(right) / len(right) >= LEAST[attribute]


def test_noise_and_plain_colours_are_unreadable(shipped: Probes) -> None:
    noise = torch.randint(0, 256, (NUM_FRAMES, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator())
    still = noise[:1].expand_as(noise)
    plain = [torch.full_like(noise, value) for value in (0, 128, 255)]
    for one in shipped.read([noise, still, *plain], FPS):
        assert not any(one.to_dict().values()), one.confidences


def test_frames_in_disorder_have_no_action_and_no_camera_move(
    shipped: Probes, videos: list[torch.Tensor], found: list[Readings], clips: list[Clip]
) -> None:
    moving = [
        index
        for index, clip in enumerate(clips)
        if clip.camera not in ("static", "wander") and clip.subjects[0].action not in ("stays", "spins")
    ]
    order = [4, 0, 7, 2, 8, 1, 5, 3, 6]
    disordered = shipped.read([videos[index][order] for index in moving], FPS)
    claimed = [one[name] is not None for one in disordered for name in ("action", "camera")]
    straight = [found[index][name] is not None for index in moving for name in ("action", "camera")]
    assert sum(claimed) < 0.25 * sum(straight)
    scenes = [one["scene"] == clips[index].scene for one, index in zip(disordered, moving, strict=True)]
    assert sum(scenes) >= 0.8 * len(scenes), "what they show can still be read"


def test_one_attribute_changed_changes_that_reading_alone(shipped: Probes, clips: list[Clip]) -> None:
    rng, kept = random.Random(3), []
    solids = [clip for clip in clips if clip.subjects[0].shape != "head"][:12]
    before = shipped.read(list(render(solids, num_frames=NUM_FRAMES, fps=FPS).frames), FPS)
    recoloured = [
        replace(
            clip,
            subjects=(
                replace(
                    clip.subjects[0],
                    colour=rng.choice([name for name in ATTRIBUTES["colour"] if name != clip.subjects[0].colour]),
                ),
            ),
        )
        for clip in solids
    ]
    after = shipped.read(list(render(recoloured, num_frames=NUM_FRAMES, fps=FPS).frames), FPS)
    for one, other, clip in zip(before, after, recoloured, strict=True):
        kept.append(other.guesses["colour"] == clip.subjects[0].colour)
        kept += [one.guesses[name] == other.guesses[name] for name in ATTRIBUTES if name != "colour"]
    assert sum(kept) / len(kept) > 0.85


def test_other_sizes_lengths_and_rates_are_read_alike(shipped: Probes, clips: list[Clip]) -> None:
    usual = render(clips[:6], num_frames=NUM_FRAMES, fps=FPS).frames
    wide = render(clips[:6], num_frames=17, fps=8, height=64, width=96).frames
    fast = render(clips[:6], num_frames=40, fps=16, height=96, width=96).frames
    first = shipped.read(list(usual), FPS)
    for others in (shipped.read(list(wide), 8), shipped.read(list(fast), 16)):
        same = [
            one.guesses[name] == two.guesses[name]
            for one, two in zip(first, others, strict=True)
            for name in ATTRIBUTES
        ]
        assert sum(same) / len(same) > 0.8


def test_prepare_takes_the_middle_square_and_holds_the_last_frame() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).view(1, 1, 64, 1).expand(3, 32, 64, 3)
    seen = probes.prepare(ramp, fps=1.0)
    assert seen.shape == (3, NUM_FRAMES, SIDE, SIDE)
    columns = (seen[0, 0, 64] + 1) * 127.5
    assert columns[0] == pytest.approx(16, abs=0.5) and columns[-1] == pytest.approx(47, abs=0.5)
    moving = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, SIDE, SIDE, 3)
    held = (probes.prepare(moving, fps=2.0)[0, :, 0, 0] + 1) * 127.5
    assert held.round().tolist() == [0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert probes.prepare(moving[0]).shape == seen.shape, "a picture is a video of one frame"
    tall = probes.prepare(torch.zeros(2, 60, 40, 3, dtype=torch.uint8))
    assert tall.shape == seen.shape
    with pytest.raises(UsageError, match=r"\[F, H, W, 3\]"):
        probes.prepare(torch.zeros(2, 3, 60, 40, dtype=torch.uint8))


def test_the_subject_is_cut_out_where_attention_is() -> None:
    side, cell = probes.ATTENTION_SIDE, SIDE // probes.ATTENTION_SIDE
    attention = torch.full((1, 3, side, side), -1e4)
    for look, left in enumerate((2, 6, 10)):  # a patch of 4 x 4 cells that moves to the right by 4 cells a look
        attention[0, look, 6:10, left : left + 4] = 0
    where = probes.boxes(attention.flatten(2))
    x, y, half = where[0].unbind(1)
    assert where.shape == (1, NUM_FRAMES, 3)
    torch.testing.assert_close(x, torch.linspace(-0.5, 0.5, NUM_FRAMES), atol=1e-4, rtol=0)  # also where none looked
    torch.testing.assert_close(y, torch.zeros(NUM_FRAMES), atol=1e-4, rtol=0)
    assert (half > 0.25).all() and (half < 0.5).all(), "all of the patch, and not much more"
    video = torch.zeros(1, NUM_FRAMES, 3, SIDE, SIDE)
    for frame in range(NUM_FRAMES):
        video[0, frame, :, 6 * cell : 10 * cell, (frame + 2) * cell : (frame + 6) * cell] = 1
    near = probes.crops(video, where, 32)
    assert near.shape == (1, NUM_FRAMES, 3, 32, 32)
    torch.testing.assert_close(near, near[:, :1].expand_as(near), atol=1e-3, rtol=0)  # what moves stands still
    assert near[0, 0, 0, 16, 16] == 1 and near[0, 0, 0, 0].max() == 0


def test_the_shipped_probes_are_small(shipped: Probes) -> None:
    assert sum(p.numel() for p in shipped.network.parameters()) < 5e6
    folder = Path(probes.__file__).parent / "probes"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6


def test_probes_are_saved_and_loaded(tmp_path: Path, shipped: Probes, videos: list[torch.Tensor]) -> None:
    probes.save(tmp_path, shipped.network, same_face_from=shipped.same_face_from)
    again = probes.load(tmp_path).read(videos[:2], FPS)
    assert [one.guesses for one in again] == [one.guesses for one in shipped.read(videos[:2], FPS)]
    with pytest.raises(CheckpointError, match="vgen train probes"):
        probes.load(tmp_path / "none")
    config = tmp_path / probes.CONFIG
    config.write_text(config.read_text().replace('"grass"', '"lawn"'))
    with pytest.raises(CheckpointError, match="other attributes"):
        probes.load(tmp_path)
