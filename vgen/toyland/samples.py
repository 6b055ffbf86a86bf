"""Sample clips on disk: videos, their truth, and a contact sheet."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vgen import video
from vgen.toyland.captions import LENGTHS, caption
from vgen.toyland.renderer import render
from vgen.toyland.scene import sample_clips

LABEL_HEIGHT = 14  # pixels
SHEET_COLUMNS = 5  # frames of each clip, evenly spaced


def write(folder: Path, *, count: int, seed: int, width: int, height: int, num_frames: int, fps: float) -> None:
    """Write `count` clips into a new `folder`: NNN.mp4, NNN.json (clip and captions), NNN.npz (truth), sheet.png.

    The npz holds `masks` uint8 [K, F, H, W], `depth` float16 [F, H, W] in metres, `tracks` [K, F, 3] in metres,
    `pixel_tracks` [K, F, 2], `extrinsics` [F, 4, 4] and `intrinsics` [3, 3].
    """
    folder.mkdir(parents=True)
    rows = []
    for index, clip in enumerate(islice(sample_clips(seed), count)):
        rendered = render([clip], num_frames=num_frames, height=height, width=width, fps=fps)
        rng = random.Random(clip.layout)
        facts = {**asdict(clip), "captions": {length: caption(clip, rng, length) for length in LENGTHS}}
        name = folder / f"{index:03d}"
        video.save(rendered.frames[0].numpy(), name.with_suffix(".mp4"), fps=fps, manifest={"toyland": facts})
        name.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
        np.savez_compressed(
            name.with_suffix(".npz"),
            masks=rendered.masks[0].numpy(),
            depth=rendered.depth[0].half().numpy(),
            tracks=rendered.tracks[0].numpy(),
            pixel_tracks=rendered.pixel_tracks[0].numpy(),
            extrinsics=rendered.extrinsics[0].numpy(),
            intrinsics=rendered.intrinsics.numpy(),
        )
        rows.append(rendered.frames[0])
    Image.fromarray(contact_sheet(rows).numpy()).save(folder / "sheet.png")


def contact_sheet(videos: Iterable[Tensor]) -> Tensor:
    """Return a picture, uint8 [rows, columns, 3]: a row of evenly spaced frames for each video [F, H, W, 3]."""
    rows = []
    for frames in videos:
        picks = torch.linspace(0, len(frames) - 1, min(SHEET_COLUMNS, len(frames))).round().long()
        rows.append(torch.cat(list(frames[picks]), 1))
    return torch.cat(rows)


def labelled_sheet(videos: Iterable[Iterable[Tensor]], labels: Iterable[str]) -> Image.Image:
    """Return a picture: for each row a label and, under it, frames of some videos [F, H, W, 3] side by side."""
    rows = [torch.cat([contact_sheet([frames]) for frames in beside], 1) for beside in videos]
    high, wide = max(len(row) for row in rows) + LABEL_HEIGHT, max(row.shape[1] for row in rows)
    sheet = Image.new("RGB", (wide, high * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        draw.text((2, index * high + 1), label, fill="black")
        sheet.paste(Image.fromarray(row.numpy()), (0, index * high + LABEL_HEIGHT))
    return sheet
