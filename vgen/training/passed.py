"""Clips to train and test probes on: rendered, and passed through a VAE, kept on disk because that is slow."""

from __future__ import annotations

import json
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

from vgen.checkpoints import sha256
from vgen.errors import VgenError
from vgen.toyland.looks import LOOK_SIZE, look
from vgen.toyland.probes import ATTENTION_SIDE, LOOK_FRAMES, NUM_FRAMES, SECONDS, SIDE
from vgen.toyland.prompts import ATTRIBUTES, even_clips, truth
from vgen.toyland.renderer import Rendered, render
from vgen.toyland.scene import Clip

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
    """Yield clips evenly over all attributes; each identity comes in two clips, and some have no subject, or two."""
    rng = random.Random(f"probes/{seed}")
    waiting: tuple[float, ...] = ()
    for index, clip in enumerate(even_clips(seed)):
        subject = clip.subjects[0]
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


@torch.no_grad()
def through_vae(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """Return what a VAE leaves of frames uint8 [B, F, H, W, 3], in the same form."""
    video = frames.to(vae.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.autocast(vae.device.type, torch.bfloat16):
        rebuilt: Tensor = vae.decode(vae.encode(video).latent_dist.mode()).sample
    return rebuilt.float().add(1).mul(127.5).round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 4, 1)


def passed_examples(clips: list[Clip], vae: AutoencoderKLWan) -> Examples:
    """Return clips that were rendered and went through a VAE: blurred as generated videos are."""
    rendered = render(clips, num_frames=VIDEO_FRAMES, height=SIDE, width=SIDE, fps=(VIDEO_FRAMES - 1) / SECONDS)
    every = (VIDEO_FRAMES - 1) // (NUM_FRAMES - 1)
    seen = {name: getattr(rendered, name)[:, :, ::every] for name in ("masks", "tracks")}
    seen["extrinsics"] = rendered.extrinsics[:, ::every]
    frames = torch.cat([through_vae(vae, clip) for clip in torch.split(rendered.frames, 2)])
    return Examples(frames=frames[:, ::every], **truth_of(clips, replace(rendered, **seen)))


def passed_set(folder: Path, vae: Path, *, count: int, seed: int) -> Examples:
    """Return the first `count` of `probe_clips(seed)` after the VAE in the folder `vae`, making what `folder` lacks.

    Raises `VgenError` where `folder` holds clips that went through another VAE.
    """
    cache = folder / f"passed-{seed}"
    cache.mkdir(parents=True, exist_ok=True)
    made_by = {"vae": sha256(vae / "diffusion_pytorch_model.safetensors")}
    card = cache / "vae.json"
    if card.exists() and json.loads(card.read_text()) != made_by:
        raise VgenError(f"The clips in {cache} went through another VAE.", tip="choose another --output.")
    card.write_text(json.dumps(made_by))
    clips = list(islice(probe_clips(seed), -(-count // SHARD_CLIPS) * SHARD_CLIPS))
    codec = None
    shards = []
    for index, start in enumerate(range(0, len(clips), SHARD_CLIPS)):
        path = cache / f"{index:05d}.safetensors"
        if not path.exists():
            codec = codec or AutoencoderKLWan.from_pretrained(vae).eval()
            made = passed_examples(clips[start : start + SHARD_CLIPS], codec)
            save_file({name: value.contiguous() for name, value in vars(made).items()}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
            logger.info("%d of %d clips rendered and passed through the VAE", start + SHARD_CLIPS, len(clips))
        shards.append(Examples(**load_file(path)))
    return joined(shards)[:count]
