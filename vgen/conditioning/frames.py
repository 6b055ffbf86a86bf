"""Given images and known frames: parts of the video that are there before the rest is generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen.errors import UsageError
from vgen.sampling.flow import Velocity

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GivenImages:
    """What a video begins with, and maybe ends with: frames uint8 [1, 1, H, W, 3] of the video's size."""

    first: Tensor
    last: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ImageCondition:
    """How given images reach a model: by latents that are held, by inputs of its own, by the noise; or several.

    `inputs` goes to the backbone's `velocity`, which alone looks inside; `start` makes of the noise [1, C, T, h, w]
    what the sampler starts from.
    """

    known: KnownFrames | None = None
    inputs: Any = None
    start: Callable[[Tensor], Tensor] = lambda noise: noise


@dataclass(frozen=True, kw_only=True)
class KnownFrames:
    """Latents [1, C, T, h, w] that are given where `mask` [1, 1, T, 1, 1] is true; the others mean nothing."""

    latents: Tensor
    mask: Tensor

    def hold(self, latents: Tensor) -> Tensor:
        """Return latents [B, C, T, H, W] with the known ones put in place."""
        return self.latents.where(self.mask, latents)

    def held(self, velocity: Velocity) -> Velocity:
        """Return a velocity that sees the known latents in place, whatever the sampler has made of them."""
        return lambda latents, sigma: velocity(self.hold(latents), sigma)


def first_frame(frame_latents: Tensor, num_latent_frames: int) -> KnownFrames:
    """Return known frames out of the latents [1, C, 1, H, W] of a first frame, for `num_latent_frames` in all."""
    mask = frame_latents.new_zeros((1, 1, num_latent_frames, 1, 1)).bool()
    mask[:, :, 0] = True
    return KnownFrames(latents=frame_latents.expand(-1, -1, num_latent_frames, -1, -1), mask=mask)


def open_image(path: Path) -> Image:
    """Return the image at `path` in RGB, turned as its EXIF says; raises `UsageError` where there is none."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise UsageError(f"There is no image {path}.", tip="check the path.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UsageError(f"Cannot read the image {path}: {reason}.", tip="give a PNG, JPEG or WebP file.") from error


def fit_image(image: Image, width: int, height: int) -> np.ndarray:
    """Return an image as uint8 [height, width, 3], scaled to cover the size and cut around its middle."""
    import numpy as np
    from PIL import Image as PIL_Image
    from PIL import ImageOps

    return np.asarray(ImageOps.fit(image, (width, height), PIL_Image.Resampling.LANCZOS))
