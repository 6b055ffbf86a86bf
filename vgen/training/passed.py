"""Clips to train and test probes on: rendered, and passed through a VAE, kept on disk because that is slow."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vgen.toyland.looks import LOOK_SIZE, look
from vgen.toyland.probes import ATTENTION_SIDE, LOOK_FRAMES, NUM_FRAMES, SECONDS, SIDE
from vgen.toyland.prompts import ATTRIBUTES, even_clips, identity_of, truth
from vgen.toyland.renderer import Rendered, render
from vgen.toyland.scene import Clip, start_place
from vgen.training import codec
from vgen.training.latents import require_made_by

logger = logging.getLogger(__name__)

TRAINING_SEED, VALIDATION_SEED, TEST_SEED = 3_000_001, 3_000_002, 3_000_003
SHARD_CLIPS = 32
VIDEO_FRAMES = 17  # two seconds at the frame rate of Toyland, of which the probes see every second frame
OUT_OF_SIGHT = (1e3, 1e3)  # a place that no camera sees
PATH_SIZE = 15  # numbers per frame of a `path`: the subject's place and the camera's pose


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Clips as the probes see them, with their truth."""

    frames: Tensor
    """uint8 [N, NUM_FRAMES, SIDE, SIDE, 3]."""
    coverage: Tensor
    """uint8 [N, LOOK_FRAMES, ATTENTION_SIDE, ATTENTION_SIDE]: how much of each cell the subjects cover, 255 = all."""
    path: Tensor
    """float32 [N, NUM_FRAMES, PATH_SIZE]: the first subject's centre in the world, then the extrinsics [3, 4]."""
    labels: Tensor
    """int64 [N, ATTRIBUTES]: indices of values."""
    looks: Tensor
    """float32 [N, LOOK_SIZE] of heads; NaN for solids."""
    single: Tensor
    """bool [N]: exactly one subject is in sight."""

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, picks: list[int] | slice) -> Examples:
        return Examples(**{name: value[picks] for name, value in vars(self).items()})


def joined(parts: list[Examples]) -> Examples:
    """Return the examples of several as one."""
    return Examples(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def probe_clips(seed: int) -> Iterator[Clip]:
    """Yield clips even in all attributes, but with more heads, each in two clips; some have no subject, or two."""
    rng = random.Random(f"probes/{seed}")
    waiting: tuple[float, ...] = ()
    for index, clip in enumerate(even_clips(seed)):
        subject = clip.subjects[0]
        if index % 6 == 3 and subject.shape != "head":  # faces differ in more than all else does
            subject = replace(subject, shape="head", identity=identity_of(subject.colour, rng))
        if subject.shape == "head":
            if waiting:
                colour = ATTRIBUTES["colour"][int(waiting[10] * len(ATTRIBUTES["colour"]))]
                subject, waiting = replace(subject, identity=waiting, colour=colour), ()
            else:
                waiting = subject.identity
        if index % 24 == 5:
            subject = replace(subject, place=OUT_OF_SIGHT)
        subjects = [subject]
        if index % 24 == 17:
            apart = (-1.25 if subject.place[0] > 0 else 1.25, rng.uniform(-1.2, 0.4))
            other = replace(next(even_clips(rng.getrandbits(31))).subjects[0], place=apart, actions=((0.0, "stays"),))
            subjects.append(other)
        yield replace(clip, subjects=tuple(subjects))


def head_pairs(seed: int) -> Iterator[Clip]:
    """Yield two clips of one toy head after the other, alike in nothing but its identity and colour."""
    for clip, other in batched(even_clips(seed), 2):
        head = clip.subjects[0]
        identity = identity_of(head.colour, random.Random(clip.layout))
        for one in (clip, other):
            face = replace(one.subjects[0], shape="head", colour=head.colour, identity=identity)
            yield replace(one, subjects=(face,))


def turn_clips(seed: int) -> Iterator[Clip]:
    """Yield clips of solids that spin or stay, small cones and cylinders above all: their spin shows least."""
    rng = random.Random(f"turns/{seed}")
    for index, clip in enumerate(even_clips(seed)):
        subject = clip.subjects[0]
        shape = rng.choice(("cone", "cylinder")) if subject.shape == "head" or index % 2 else subject.shape
        size = "small" if index % 3 else subject.size
        place = start_place(rng, action := rng.choice(("spins", "stays")))
        solid = replace(subject, shape=shape, size=size, actions=((0.0, action),), place=place, identity=())
        yield replace(clip, subjects=(solid,))


def batched(clips: Iterator[Clip], size: int) -> Iterator[tuple[Clip, ...]]:
    """Yield tuples of `size` clips, as itertools does from Python 3.12 on."""
    while True:
        yield tuple(islice(clips, size))


def truth_of(clips: list[Clip], rendered: Rendered) -> dict[str, Tensor]:
    """Return everything of `Examples` but the frames, for clips rendered at NUM_FRAMES frames."""
    cell = rendered.frames.shape[2] // ATTENTION_SIDE
    masks = rendered.masks[:, :, list(LOOK_FRAMES)].sum(1, dtype=torch.float32).clamp(max=255)
    tracks, poses = rendered.tracks[:, 0], rendered.extrinsics[:, :, :3].flatten(2)
    return {
        "coverage": nn.functional.avg_pool2d(masks, cell).to(torch.uint8),
        "path": torch.cat([tracks, poses], 2),
        "labels": torch.tensor(
            [[values.index(truth(clip)[name]) for name, values in ATTRIBUTES.items()] for clip in clips]
        ),
        "looks": torch.stack(
            [
                look(clip.subjects[0].identity, clip.subjects[0].colour)
                if clip.subjects[0].shape == "head"
                else torch.full((LOOK_SIZE,), torch.nan)
                for clip in clips
            ]
        ),
        "single": torch.tensor([len(clip.subjects) == 1 and clip.subjects[0].place != OUT_OF_SIGHT for clip in clips]),
    }


def rendered_examples(clips: list[Clip]) -> Examples:
    """Return clips as rendered: sharp."""
    rendered = render(clips, num_frames=NUM_FRAMES, height=SIDE, width=SIDE, fps=(NUM_FRAMES - 1) / SECONDS)
    return Examples(frames=rendered.frames, **truth_of(clips, rendered))


def passed_examples(clips: list[Clip], vae: AutoencoderKLWan) -> Examples:
    """Return clips that were rendered and went through a VAE: blurred as generated videos are."""
    rendered = render(clips, num_frames=VIDEO_FRAMES, height=SIDE, width=SIDE, fps=(VIDEO_FRAMES - 1) / SECONDS)
    every = (VIDEO_FRAMES - 1) // (NUM_FRAMES - 1)
    seen = {name: getattr(rendered, name)[:, :, ::every] for name in ("masks", "tracks")}
    seen["extrinsics"] = rendered.extrinsics[:, ::every]
    frames = torch.cat([codec.decode(vae, codec.encode(vae, clip)) for clip in torch.split(rendered.frames, 2)])
    return Examples(frames=frames[:, ::every], **truth_of(clips, replace(rendered, **seen)))


def passed_set(folder: Path, vae: Path, clips: list[Clip], *, name: str) -> Examples:
    """Return `clips` after the VAE in the folder `vae`; what `folder` lacks under that name is made and kept.

    Raises `VgenError` where the clips of that name went through another VAE.
    """
    cache = folder / f"passed-{name}"
    require_made_by(vae, cache)
    coder = None
    shards = []
    for index, start in enumerate(range(0, len(clips), SHARD_CLIPS)):
        path, batch = cache / f"{index:05d}.safetensors", clips[start : start + SHARD_CLIPS]
        kept = Examples(**load_file(path)) if path.exists() else None
        if kept is None or len(kept) < len(batch):
            coder = coder or codec.load_codec(vae)
            kept = passed_examples(batch, coder)
            save_file({key: value.contiguous() for key, value in vars(kept).items()}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
            logger.info("%s: %d of %d clips through the VAE", name, start + len(batch), len(clips))
        shards.append(kept[: len(batch)])
    return joined(shards)
