"""Makes docs/generated.jpg: the embedded model's videos of docs/generated.txt at seed 1, five frames of each.

    python scripts/generated.py

The first half of the prompts is on the left.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from vgen import video

DOCS = Path(__file__).parent.parent / "docs"
NUM_FRAMES, GAP = 5, 8  # of each video; pixels between the columns


def strip(path: Path) -> np.ndarray:
    """Return frames of a video side by side, [H, NUM_FRAMES * W, 3], from the first to the last."""
    frames = video.read(path).frames
    picks = np.linspace(0, len(frames) - 1, NUM_FRAMES).round().astype(int)
    return np.concatenate(list(frames[picks]), axis=1)


def main() -> None:
    prompts = DOCS / "generated.txt"
    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder) / "clip.mp4"
        command = ["generate", "--prompts", str(prompts), "--seed", "1", "--output", str(clips)]
        subprocess.run([sys.executable, "-m", "vgen", *command], check=True)
        count = len(prompts.read_text(encoding="utf-8").splitlines())
        strips = [strip(clips.with_stem(f"clip-{line}")) for line in range(1, count + 1)]
    columns = [np.concatenate(strips[: count // 2]), np.concatenate(strips[count // 2 :])]
    gap = np.full((len(columns[0]), GAP, 3), 255, np.uint8)
    Image.fromarray(np.concatenate([columns[0], gap, columns[1]], axis=1)).save(DOCS / "generated.jpg", quality=88)


if __name__ == "__main__":
    main()
