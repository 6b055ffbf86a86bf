"""The uses of known frames: what the user gave, window by window, and what becomes of the windows that are made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vgen import runtime
from vgen.conditioning.images import cut_note, fit_image, open_image
from vgen.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vgen.conditioning.canvas import Canvas
    from vgen.plan import Plan
    from vgen.video import Frames


class Given(Protocol):
    """A use of known frames. A window is what a model makes at once, `Plan.num_frames` frames."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was cut, resampled or held for it, in sentences."""

    @property
    def num_windows(self) -> int:
        """How many windows the video takes."""

    def canvas(self, made: Sequence[Frames]) -> Canvas:
        """Return what is given of the window after those that are `made`, each [F, H, W, 3]."""

    def finish(self, made: Sequence[Frames]) -> Frames:
        """Return the video [F, H, W, 3] out of the windows that are made."""


def of(plan: Plan) -> Given | None:
    """Return the use of known frames that a plan asks for; None where there is none but a first image.

    Reads every file. Raises `UsageError` for one that cannot be read or does not fit the others.
    """
    if plan.extend is not None:
        return Continuation.of(plan)
    if plan.video is not None:
        return Completion.of(plan)
    if plan.interpolate or (plan.known_frames and (plan.last_image or plan.known_frames == "reinject")):
        return Keyframes.of(plan)
    return None


@dataclass(frozen=True, kw_only=True)
class Keyframes:
    """Pictures uint8 [H, W, 3] by the number of the frame they are at.

    A latent frame after the first stands for several frames, so a picture at frame k is shown from k - r + 1 to k,
    with r frames to a latent one.
    """

    pictures: dict[int, Frames]
    num_frames: int
    frames_per_latent: int
    notes: tuple[str, ...] = ()
    num_windows: int = 1

    @classmethod
    def of(cls, plan: Plan) -> Keyframes:
        """Return the pictures of a plan: the first, the last and those between. Raises `UsageError`."""
        per_latent, last = plan.checkpoint.rules.frame_multiple, plan.num_frames - 1
        asked = [(plan.image, 0)] if plan.image else []
        asked += [keyframe(text) for text in plan.interpolate or ()]
        asked += [(plan.last_image, last)] if plan.last_image else []
        pictures: dict[int, Frames] = {}
        notes = []
        for path, frame in sorted(asked, key=lambda one: one[1]):
            _check_frame(frame, last, per_latent)
            if frame in pictures:
                raise UsageError(f"Two images are given for frame {frame}.", tip="give each frame one.")
            image = open_image(path)
            notes.append(cut_note(f"The image {path.name}", image.size, (plan.width, plan.height)))
            pictures[frame] = fit_image(image, plan.width, plan.height)
            if frame:
                begin = frame - per_latent + 1
                notes.append(
                    f"The image {path.name} stands still at frames {begin} to {frame}: they are one latent frame."
                )
        return cls(
            pictures=pictures,
            num_frames=plan.num_frames,
            frames_per_latent=per_latent,
            notes=tuple(note for note in notes if note),
        )

    def canvas(self, made: Sequence[Frames]) -> Canvas:
        """Return the pictures in place."""
        import numpy as np

        from vgen.conditioning.canvas import Canvas

        shape = next(iter(self.pictures.values())).shape
        frames = np.zeros((self.num_frames, *shape), np.uint8)
        known = np.zeros(frames.shape[:3], bool)
        for frame, picture in self.pictures.items():
            shown = slice(max(0, frame - self.frames_per_latent + 1), frame + 1)
            frames[shown], known[shown] = picture, True
        return Canvas(frames=frames, known=known)

    def finish(self, made: Sequence[Frames]) -> Frames:
        """Return the window as it is."""
        return made[0]


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A clip [F, H, W, 3] that goes on for `num_new` frames, in windows that begin with the last frames so far.

    `overlaps` has for each window how many of its frames those are.
    """

    clip: Frames
    num_new: int
    window: int
    overlaps: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_windows(self) -> int:
        """How many windows it takes."""
        return len(self.overlaps)

    @classmethod
    def of(cls, plan: Plan) -> Continuation:
        """Return the continuation that a plan asks for. Raises `UsageError`."""
        assert plan.extend is not None
        clip, notes = _clip(plan)
        num_new = max(1, round(plan.extend * plan.fps))
        free = runtime.memory("cpu").free
        if num_new * clip[0].nbytes > free:
            raise UsageError(
                f"{plan.extend:g} more seconds do not fit into the {free / 1e9:.1f} GB of memory that are free.",
                tip="use a shorter --extend, and go on from the video that was made.",
            )
        overlaps = overlaps_of(len(clip), num_new, window=plan.num_frames, step=plan.checkpoint.rules.frame_multiple)
        notes.append(
            f"{num_new} frames ({num_new / plan.fps:.4g} s) go behind the {len(clip)} of the clip, in "
            f"{len(overlaps)} {'window' if len(overlaps) == 1 else 'windows'} of {plan.num_frames} frames."
        )
        return cls(clip=clip, num_new=num_new, window=plan.num_frames, overlaps=tuple(overlaps), notes=tuple(notes))

    def canvas(self, made: Sequence[Frames]) -> Canvas:
        """Return a window that begins with the last frames so far."""
        import numpy as np

        from vgen.conditioning.canvas import Canvas

        overlap = self.overlaps[len(made)]
        so_far = self._joined(made)
        frames = np.zeros((self.window, *so_far.shape[1:]), np.uint8)
        known = np.zeros(frames.shape[:3], bool)
        frames[:overlap], known[:overlap] = so_far[-overlap:], True
        return Canvas(frames=frames, known=known)

    def finish(self, made: Sequence[Frames]) -> Frames:
        """Return the clip as it is and what follows."""
        return self._joined(made)[: len(self.clip) + self.num_new]

    def _joined(self, made: Sequence[Frames]) -> Frames:
        import numpy as np

        frames = self.clip
        for overlap, window in zip(self.overlaps, made, strict=False):
            new = matched(window[overlap:], window[:overlap], frames[-overlap:])
            frames = np.concatenate([frames, new])
        return frames


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A clip [F, H, W, 3] of which the pixels that are not `known` [F, H, W] are made anew.

    `num_frames` is the window's, which may be longer than the clip.
    """

    clip: Frames
    known: NDArray[np.bool_]
    num_frames: int
    notes: tuple[str, ...] = ()
    num_windows: int = 1

    @classmethod
    def of(cls, plan: Plan) -> Completion:
        """Return the completion that a plan asks for. Raises `UsageError`."""
        import numpy as np

        clip, notes = _clip(plan)
        clip = clip[: plan.num_frames]
        known = np.ones(clip.shape[:3], bool)
        if plan.mask is not None:
            image = open_image(plan.mask)
            notes.append(cut_note(f"The mask {plan.mask.name}", image.size, (plan.width, plan.height)) or "")
            known &= fit_image(image, plan.width, plan.height).mean(-1) < 128
            if known.all():
                raise UsageError(f"The mask {plan.mask} is black: it leaves nothing to make.", tip="paint it white.")
        if plan.missing is not None:
            known[missing_frames(plan.missing, len(clip))] = False
        if not known.any():
            raise UsageError("Nothing of the clip is left to go by.", tip="leave some of it out of --mask, --missing.")
        return cls(clip=clip, known=known, num_frames=plan.num_frames, notes=tuple(note for note in notes if note))

    def canvas(self, made: Sequence[Frames]) -> Canvas:
        """Return the clip; where a window is longer, the last frame stands still."""
        import numpy as np

        from vgen.conditioning.canvas import Canvas

        shown = np.minimum(np.arange(self.num_frames), len(self.clip) - 1)
        return Canvas(frames=self.clip[shown], known=self.known[shown])

    def finish(self, made: Sequence[Frames]) -> Frames:
        """Return the clip with what is made in its holes."""
        from vgen.conditioning.canvas import Canvas

        return Canvas(frames=self.clip, known=self.known).paste(made[0][: len(self.clip)])


def keyframe(text: str) -> tuple[Path, int]:
    """Return the image and the frame number of `IMAGE@FRAME`. Raises `UsageError`."""
    path, _, frame = text.rpartition("@")
    if not (path and re.fullmatch(r"\d{1,9}", frame)):
        raise UsageError(
            f'"{text}" does not say which image is at which frame.', tip="write --interpolate picture.png@8."
        )
    return Path(path), int(frame)


def missing_frames(text: str, num_frames: int) -> list[int]:
    """Return the frame numbers of `5-12,20`, counted from 0. Raises `UsageError` for any that a clip has not."""
    frames: set[int] = set()
    for part in text.split(","):
        if not (found := re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)):
            raise UsageError(f'"{text}" is no list of frames.', tip="write --missing 5-12, or --missing 0,5-12.")
        first, last = int(found[1]), int(found[2] or found[1])
        if first > last or last >= num_frames:
            raise UsageError(
                f"There are no frames {part.strip()} in a clip of {num_frames}.",
                tip=f"choose from 0 to {num_frames - 1}, the lower number first.",
            )
        frames.update(range(first, last + 1))
    return sorted(frames)


def overlaps_of(num_given: int, num_new: int, *, window: int, step: int) -> list[int]:
    """Return for each window of a continuation how many frames it begins with that are there already.

    Half of a window's latent frames, fewer of a short clip; always 1 + k * `step` frames, which are whole latent ones.
    """
    if window <= step:
        raise UsageError(
            f"A window of {window} frame has no room to go on in.", tip=f"use --frames {1 + step} or more."
        )
    most = (((window - 1) // step + 1) // 2 - 1) * step + 1
    overlaps = []
    length = num_given
    while length < num_given + num_new:
        overlap = (min(length, most) - 1) // step * step + 1
        overlaps.append(overlap)
        length += window - overlap
    return overlaps


def matched(frames: Frames, decoded: Frames, true: Frames) -> Frames:
    """Return frames [F, H, W, 3] with the colour shift taken off that `decoded` frames have from the `true` ones.

    A VAE and a model shift the mean of each channel a little, which shows as a flash at a seam and adds up over many.
    """
    import numpy as np

    shift = (true.astype(np.float32) - decoded).mean((0, 1, 2))
    shifted: Frames = (frames + shift).round().clip(0, 255).astype(np.uint8)
    return shifted


def _clip(plan: Plan) -> tuple[Frames, list[str]]:
    """Return the frames of a plan's video at the plan's rate and size, and what was changed for it."""
    from vgen.conditioning import clips

    assert plan.video is not None
    video = clips.read(plan.video)
    frames = clips.at_rate(video, plan.fps)
    height, width = frames.shape[1:3]
    notes = []
    if not clips.is_same_rate(video, plan.fps):
        notes.append(
            f"The clip has {video.fps:g} frames per second and the video {plan.fps:g}: {len(video.frames)} frames "
            f"become {len(frames)}. Tip: --fps {video.fps:g} keeps them all."
        )
    if (width, height) != (plan.width, plan.height):
        notes.append(
            cut_note("The clip", (width, height), (plan.width, plan.height))
            or f"The clip is {width}x{height} and is scaled to {plan.width}x{plan.height}."
        )
    return clips.fitted(frames, plan.width, plan.height), notes


def _check_frame(frame: int, last: int, step: int) -> None:
    """Raise `UsageError` unless a frame is the last of a latent one, within the video."""
    if 0 <= frame <= last and frame % step == 0:
        return
    near = sorted({min(max(k * step, 0), last) for k in (frame // step, frame // step + 1)})
    longer = f", or --frames {-(-frame // step) * step + 1} for a longer video" if frame > last else ""
    raise UsageError(
        f"An image at frame {frame} is not legal: a video of {last + 1} frames takes multiples of {step} from 0 to "
        f"{last}.",
        tip=f"use {' or '.join(f'@{number}' for number in near)}{longer}.",
    )
