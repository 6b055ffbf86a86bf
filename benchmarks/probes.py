"""Measures the shipped probes on renders of a seed that no training uses, sharp and after the embedded VAE.

    python benchmarks/probes.py --clips 256 --heads 64 --folder runs/probes-test

Prints one JSON object. The clips that went through the VAE are kept in the folder.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from toyland import cpu_name

from vgen import checkpoints
from vgen.toyland import probes, readings
from vgen.toyland.probes import NUM_FRAMES, SECONDS, Probes, Readings
from vgen.toyland.prompts import ATTRIBUTES, even_clips, truth
from vgen.toyland.renderer import render
from vgen.toyland.scene import Clip, start_place
from vgen.training.passed import TEST_SEED, Examples, head_pairs, joined, passed_set, rendered_examples
from vgen.training.probes import equal_error

FPS = (NUM_FRAMES - 1) / SECONDS
GROUP = 16  # clips read, or rendered, at once


def read(shipped: Probes, frames: Tensor) -> list[Readings]:
    """Return the readings of videos [N, F, H, W, 3]."""
    return [reading for part in torch.split(frames, GROUP) for reading in shipped.read(list(part), FPS)]


def accuracy(found: list[Readings], clips: list[Clip]) -> dict[str, object]:
    """Return, by attribute, the share read right, and the share of guesses that are right; and the wrong guesses."""
    truths = [truth(clip) for clip in clips]
    pairs = list(zip(found, truths, strict=True))
    wrong = Counter(
        f"{told[name]} as {one.guesses[name]}"
        for one, told in pairs
        for name in ATTRIBUTES
        if one.guesses[name] != told[name]
    )
    return {
        "right": {name: share(one[name] == told[name] for one, told in pairs) for name in ATTRIBUTES},
        "guessed_right": {name: share(one.guesses[name] == told[name] for one, told in pairs) for name in ATTRIBUTES},
        "all_right": share(all(one[name] == told[name] for name in ATTRIBUTES) for one, told in pairs),
        "commonest_mistakes": dict(wrong.most_common(12)),
    }


def faces(found: list[Readings], examples: Examples) -> dict[str, float]:
    """Return the equal error rate of telling heads apart: among all pairs, and among heads of one colour only."""
    looks = torch.stack([one.look for one in found])
    colours = examples.labels[:, list(ATTRIBUTES).index("colour")]
    alike = [
        equal_error(looks[colours == colour], examples.looks[colours == colour])[0] for colour in colours.unique()
    ]
    known = [rate for rate in alike if rate == rate]
    return {
        "equal_error": round(equal_error(looks, examples.looks)[0], 4),
        "equal_error_same_colour": round(sum(known) / max(len(known), 1), 4),
    }


def changed(clip: Clip, attribute: str, rng: random.Random) -> Clip:
    """Return the clip with another value of one attribute, and nothing else changed that can be seen."""
    value = rng.choice([value for value in ATTRIBUTES[attribute] if value not in (truth(clip)[attribute], "head")])
    if attribute in ("scene", "camera"):
        return replace(clip, **{attribute: value})  # type: ignore[arg-type]
    (subject,) = clip.subjects
    if attribute == "action":
        return replace(
            clip, subjects=(replace(subject, actions=((0.0, value),), place=start_place(random.Random(0), value)),)
        )
    return replace(clip, subjects=(replace(subject, **{attribute: value}),))  # type: ignore[arg-type]


def one_change(shipped: Probes, clips: list[Clip]) -> dict[str, float]:
    """Return the share of changes of one attribute after which its reading, and no other, is another."""
    rng, kept = random.Random(0), {}
    solids = [clip for clip in clips if clip.subjects[0].shape != "head"]
    before = read(shipped, sharp(solids).frames)
    for name in ATTRIBUTES:
        after = read(shipped, sharp([changed(clip, name, rng) for clip in solids]).frames)
        kept[name] = share(
            all((one.guesses[key] != other.guesses[key]) == (key == name) for key in ATTRIBUTES)
            for one, other in zip(before, after, strict=True)
        )
    return kept


def fooled(shipped: Probes, frames: Tensor, clips: list[Clip]) -> dict[str, float]:
    """Return the share of readings that claim to be readable where they should not."""
    noise = torch.Generator().manual_seed(0)
    grain = torch.randint(0, 256, frames.shape, generator=noise, dtype=torch.uint8)
    moving = [at for at, clip in enumerate(clips) if clip.camera != "static" and clip.subjects[0].action != "stays"]
    order = torch.tensor([4, 0, 7, 2, 8, 1, 5, 3, 6])

    def claims(videos: Tensor, names: tuple[str, ...]) -> float:
        return share(one[name] is not None for one in read(shipped, videos) for name in names)

    everything = tuple(ATTRIBUTES)
    return {
        "noise": claims(grain, everything),
        "black": claims(torch.zeros_like(frames[:1]), everything),
        "grey": claims(torch.full_like(frames[:1], 128), everything),
        "shuffled_frames_action_camera": claims(frames[moving][:, order], ("action", "camera")),
    }


def without_learning(clips: list[Clip]) -> dict[str, float]:
    """Return how well the readings without learning do on sharp renders: shares, pixels and degrees."""
    solids = [clip for clip in clips if clip.subjects[0].shape != "head"]
    scenes, colours, off, turns = [], [], [], []
    for clip in solids:
        rendered = render([clip])
        frames, colour = rendered.frames[0], clip.subjects[0].colour
        scenes.append(readings.scene(frames) == clip.scene)
        colours.append(readings.colour(frames) == colour)
        if colours[-1]:
            away = readings.centroids(frames, colour) - rendered.pixel_tracks[0, 0]
            off.append(float(away.norm(dim=1).nanmedian()))
        if clip.camera.split()[0] in ("static", "pan", "tilt", "roll"):
            motion = readings.camera_motion(frames)
            turn = readings.turn_of(rendered.extrinsics[0, 0], rendered.extrinsics[0, -1])
            turns.append(max(abs(motion.pan - turn[0]), abs(motion.tilt - turn[1]), abs(motion.roll - turn[2])))
    return {
        "scene": share(scenes),
        "colour": share(colours),
        "centroid_off_pixels_median": round(float(torch.tensor(off).median()), 2),
        "turn_off_degrees_median": round(float(torch.tensor(turns).median()), 2),
        "turn_off_degrees_worst": round(max(turns), 2),
    }


def sharp(clips: list[Clip]) -> Examples:
    """Return clips as rendered."""
    return joined([rendered_examples(clips[start : start + GROUP]) for start in range(0, len(clips), GROUP)])


def share(values) -> float:  # type: ignore[no-untyped-def]
    """Return the share of true values."""
    listed = list(values)
    return round(sum(listed) / len(listed), 4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path("runs/probes-test"))
    asked = parser.parse_args()
    folder = checkpoints.resolve("toyland").folder
    assert folder is not None
    shipped = probes.load()
    clips = list(islice(even_clips(TEST_SEED), asked.clips))
    heads = list(islice(head_pairs(TEST_SEED + 1), 2 * asked.heads))
    blurred = passed_set(asked.folder, folder / "vae", clips, name="test")
    blurred_heads = passed_set(asked.folder, folder / "vae", heads, name="test-heads")
    clear = sharp(clips)
    some = clips[: max(32, asked.clips // 4)]
    found = {
        "machine": f"{cpu_name()}, torch {torch.__version__}",
        "clips": len(clips),
        "head_identities": asked.heads,
        "after_vae": accuracy(read(shipped, blurred.frames), clips),
        "sharp": accuracy(read(shipped, clear.frames), clips),
        "faces_after_vae": faces(read(shipped, blurred_heads.frames), blurred_heads),
        "faces_sharp": faces(read(shipped, sharp(heads).frames), blurred_heads),
        "one_attribute_changed": one_change(shipped, some),
        "claimed_readable": fooled(shipped, clear.frames[: len(some)], some),
        "without_learning": without_learning(some),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
