"""Pictures from files: read, and fitted to a video's size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vgen.errors import UsageError, reason_of

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


def open_image(path: Path) -> Image:
    """Return the image at `path` in RGB, turned as its EXIF says; raises `UsageError` where there is none."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise UsageError(f"There is no image {path}.", tip="check the path.") from error
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        RuntimeError,
        Image.DecompressionBombError,
    ) as error:
        is_none = isinstance(error, UnidentifiedImageError)
        reason = "it is no image that Pillow knows" if is_none else reason_of(error)
        raise UsageError(f"Cannot read the image {path}: {reason}.", tip="give a PNG, JPEG or WebP file.") from error


def fit_image(image: Image, width: int, height: int) -> np.ndarray:
    """Return an image as uint8 [height, width, 3], scaled to cover the size and cut around its middle."""
    import numpy as np
    from PIL import Image as PIL_Image
    from PIL import ImageOps

    return np.asarray(ImageOps.fit(image, (width, height), PIL_Image.Resampling.LANCZOS))


def cut_note(what: str, size: tuple[int, int], video_size: tuple[int, int]) -> str | None:
    """Return what to tell the user where `fit_image` cuts the edges off; sizes are (width, height)."""
    if size[0] * video_size[1] == size[1] * video_size[0]:
        return None
    return "{} is {}x{} and the video {}x{}: its edges are cut off.".format(what, *size, *video_size)
