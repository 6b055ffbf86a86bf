"""A clip of any size, rate and length as a model takes it, and what the model makes of it as the clip was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from vgen.video import Frames

WAYS = ("pad", "crop")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Where a clip of `size` lies in the model's frames of `view`, both (width, height).

    Scaled to `scaled`, the clip's top left corner comes to `corner` = (x, y) in the view: positive where the view is
    wider than the clip and padded by its mirrored edges, negative where the clip is wider and cut off.
    """

    size: tuple[int, int]
    view: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int]

    def frames(self, frames: Frames) -> Frames:
        """Return frames [F, H, W, 3] as the model sees them."""
        if self.size == self.view:
            return frames
        if self.scaled != self.size:
            resized = [Image.fromarray(frame).resize(self.scaled, Image.Resampling.LANCZOS) for frame in frames]
            frames = np.stack([np.asarray(frame) for frame in resized])
        columns, rows = (self._places(axis) for axis in (0, 1))
        return frames[:, rows][:, :, columns]

    def map(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a map [F, H, W] of the clip as a map of the view."""
        resized = _resized(torch.from_numpy(weights)[:, None], (self.scaled[1], self.scaled[0]))[:, 0].numpy()
        columns, rows = (self._places(axis) for axis in (0, 1))
        placed: NDArray[np.float32] = resized[:, rows][:, :, columns]
        return placed

    def back(self, values: Tensor) -> tuple[Tensor, tuple[slice, slice]]:
        """Return values [F, C, h, w] of the view as the part of the clip that it shows, and which rows and columns."""
        inside, outside = [], []
        for corner, view, scaled, size in zip(self.corner, self.view, self.scaled, self.size, strict=True):
            inside.append(slice(max(0, corner), min(view, corner + scaled)))
            first, last = max(0, -corner), min(scaled, view - corner)
            outside.append(slice(round(first * size / scaled), round(last * size / scaled)))
        part = values[:, :, inside[1], inside[0]]
        height, width = (part_.stop - part_.start for part_ in (outside[1], outside[0]))
        return _resized(part, (height, width)), (outside[1], outside[0])

    def note(self) -> str | None:
        """Return what to tell the user; None where nothing is changed."""
        if self.size == self.view:
            return None
        clip, view = ("{}x{}".format(*size) for size in (self.size, self.view))
        how = ""
        if any(corner > 0 for corner in self.corner):
            how = " and padded by its mirrored edges"
        elif any(corner < 0 for corner in self.corner):
            how = "; what does not fit is cut off for the model, and stays as it is in the result"
        scaled = "is" if self.scaled == self.size else "is scaled to {}x{}".format(*self.scaled)
        return f"The clip is {clip} and the model sees {view}: it {scaled}{how}. The result is {clip} again."

    def _places(self, axis: int) -> NDArray[np.int64]:
        """Return which row or column of the scaled clip each of the view shows."""
        scaled = self.scaled[axis]
        places = np.arange(self.view[axis]) - self.corner[axis]
        folded = np.abs((places - scaled + 1) % max(1, 2 * scaled - 2) - scaled + 1)
        return np.asarray(np.minimum(folded, scaled - 1))


def fit(size: tuple[int, int], view: tuple[int, int], way: str) -> Fit:
    """Return how a clip comes into a view: all of it with "pad", as much as fills the view with "crop"."""
    scales = [inner / outer for inner, outer in zip(view, size, strict=True)]
    scale = min(scales) if way == "pad" else max(scales)
    wide, high = (max(1, round(side * scale)) for side in size)
    corner = ((view[0] - wide) // 2, (view[1] - high) // 2)
    return Fit(size=size, view=view, scaled=(wide, high), corner=corner)


def view_of(size: tuple[int, int], native: Sequence[tuple[int, int]], *, multiple: int, most: int) -> tuple[int, int]:
    """Return the size at which a model sees a clip: its own where that is legal and no larger than a native one.

    Else the native size of the nearest shape. Sizes are (width, height).
    """
    area = max(wide * high for wide, high in native)
    if all(side % multiple == 0 and side <= most for side in size) and size[0] * size[1] <= area:
        return size
    shape = size[0] / size[1]
    return min(native, key=lambda one: abs(np.log(one[0] / one[1] / shape)))


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a model takes at once: `num_frames` frames from `start` on; beyond the clip its last one is held."""

    start: int
    num_frames: int

    def of(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return the window of values [F, ...]."""
        return values[np.minimum(np.arange(self.start, self.start + self.num_frames), len(values) - 1)]


def windows(num_frames: int, window: int, overlap: int) -> list[Window]:
    """Return windows that cover a clip of `num_frames`, each beginning at least `overlap` before the last one ends."""
    if num_frames <= window:
        return [Window(start=0, num_frames=window)]
    count = -(-(num_frames - overlap) // (window - overlap))
    starts = np.linspace(0, num_frames - window, count).round().astype(int)
    return [Window(start=int(start), num_frames=window) for start in starts]


def joined(parts: Sequence[Tensor], where: Sequence[Window], num_frames: int) -> Tensor:
    """Return float values [F, ...] of a clip out of those of its windows, faded into each other where they overlap."""
    if len(parts) == 1:
        return parts[0][:num_frames].float()
    rest = parts[0].shape[1:]
    total, weight = torch.zeros((num_frames, *rest)), torch.zeros(num_frames)
    for number, (part, window) in enumerate(zip(parts, where, strict=True)):
        ramp = torch.ones(window.num_frames)
        if number:
            shared = where[number - 1].start + where[number - 1].num_frames - window.start
            ramp[:shared] = torch.arange(1, shared + 1) / (shared + 1)
        if number < len(where) - 1:
            shared = window.start + window.num_frames - where[number + 1].start
            late = slice(window.num_frames - shared, None)
            ramp[late] = torch.minimum(ramp[late], torch.arange(shared, 0, -1) / (shared + 1))
        at = slice(window.start, window.start + window.num_frames)
        total[at] += part.float() * ramp.view(-1, *[1] * len(rest))
        weight[at] += ramp
    return total / weight.view(-1, *[1] * len(rest))


def _resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Return values [F, C, H, W] at another (height, width)."""
    if values.shape[2:] == size:
        return values.float()
    return nn.functional.interpolate(values.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
