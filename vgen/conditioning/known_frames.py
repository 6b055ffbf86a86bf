"""Which frames a model is given and how it is told of them: what goes together, and what a model can take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vgen.conditioning.images import open_image
from vgen.errors import UsageError

if TYPE_CHECKING:
    from vgen.checkpoints import Checkpoint
    from vgen.request import GenerateRequest

# How a model is told which frames are given: by a timestep of 0 at their tokens, or by their latents, noised anew at
# each step, which any model takes and few heed as well.
WAYS = ("timesteps", "reinject")


def way_of(request: GenerateRequest, checkpoint: Checkpoint) -> str | None:
    """Return how the model is told of given frames; None where none are, or it takes images by inputs of its own.

    Raises `UsageError` for options that do not go together, and for a model that cannot.
    """
    can = checkpoint.can
    if request.known_frames not in (None, *WAYS):
        raise UsageError(
            f'There is no way "{request.known_frames}" to give frames.', tip=f"choose {' or '.join(WAYS)}."
        )
    _check_video(request)
    images = [path for path in (request.image, request.last_image) if path is not None]
    known = [request.interpolate, request.video, *images]
    if can.needs_image:
        if request.interpolate or request.video or request.known_frames:
            raise UsageError(
                f'The model "{checkpoint.name}" makes videos from a first image, and takes no other frames.',
                tip="use --image alone, or a model with a timestep per token, such as toyland.",
            )
        if request.image is None:
            if request.last_image is not None:
                raise UsageError("There is a last image and no first one.", tip="give both: --image and --last-image.")
            raise UsageError(
                f'The model "{checkpoint.name}" makes videos from a first image, and none is given.',
                tip="give one with --image, or use a text-to-video model.",
            )
        if request.last_image is not None and not can.last_image:
            raise UsageError(f'The model "{checkpoint.name}" cannot end with an image.', tip="leave out --last-image.")
    elif not any(known):
        if request.known_frames is not None:
            raise UsageError(
                "--known-frames says how frames are given, and there are none.", tip="give some: --image, --video."
            )
        return None
    elif not can.known_frames and request.known_frames != "reinject":
        only_first = not (request.last_image or request.interpolate or request.video)
        if not (only_first and can.image_to_video):
            raise UsageError(
                f'The model "{checkpoint.name}" cannot {"start from an image" if only_first else "be given frames"}: '
                "it was not trained to.",
                tip="use a model that can, such as toyland (vgen models show tells what one can), or try "
                "--known-frames reinject.",
            )
    for path in images:
        open_image(path)
    takes_them = can.known_frames or request.known_frames == "reinject"
    return request.known_frames or "timesteps" if takes_them and not can.needs_image else None


def _check_video(request: GenerateRequest) -> None:
    """Raise `UsageError` unless a video, what is to become of it and the images go together."""
    uses = {"--extend": request.extend, "--mask": request.mask, "--missing": request.missing}
    asked = [option for option, value in uses.items() if value is not None]
    if request.video is None:
        if asked:
            raise UsageError(f"{asked[0]} is for a video, and there is none.", tip="give it with --video CLIP.")
        return
    if not asked:
        raise UsageError(
            "A video is given, and nothing to do with it.",
            tip="make it longer with --extend SECONDS, or complete it with --mask IMAGE or --missing FRAMES.",
        )
    if request.extend is not None and len(asked) > 1:
        raise UsageError(f"Both --extend and {asked[1]} are given.", tip="do one after the other.")
    if request.extend is not None and not (math.isfinite(request.extend) and request.extend > 0):
        raise UsageError(f"A video cannot go on for {request.extend:g} seconds.", tip="use --extend 2.")
    if request.image or request.last_image or request.interpolate:
        raise UsageError("Both a video and images are given.", tip="leave out the images, or --video.")
