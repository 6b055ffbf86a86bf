"""An edit, put back into its clip, and how it differs from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from vgen.editing.plan import EditPlan

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vgen.video import Frames


def maps(plan: EditPlan, view: Tensor) -> Callable[[int], Tensor]:
    """Return what gives the map [H, W] of a frame of the clip out of maps [F, 1, h, w] of the view."""
    import torch

    width, height = plan.fit.size

    def shown(frame: int) -> Tensor:
        number = int(plan.frame_of[frame])
        part, where = plan.fit.back(view[number : number + 1])
        whole = torch.zeros(height, width)
        whole[where] = part[0, 0].clamp(0, 1)
        return whole

    return shown


def put_back(plan: EditPlan, view: Tensor, weight: Callable[[int], Tensor]) -> Frames:
    """Return the clip [F, H, W, 3] with what was made of it (`view` [F, 3, h, w]), as strong as `weight` [H, W]."""
    import numpy as np
    import torch

    result = plan.clip.frames.copy()
    for frame in range(len(result)):
        number = int(plan.frame_of[frame])
        part, where = plan.fit.back(view[number : number + 1])
        share = weight(frame)[where][..., None]
        was = torch.from_numpy(result[frame][where]).float()
        blended = (share * part[0].permute(1, 2, 0) + (1 - share) * was).round().clamp(0, 255)
        result[frame][where] = blended.numpy().astype(np.uint8)
    return result


def measured(source: np.ndarray, result: np.ndarray, region: np.ndarray) -> dict[str, float | None]:
    """Return how an edit differs from its clip, frames uint8 [F, H, W, 3], inside and outside of `region` [F, H, W].

    `background_psnr` (dB) and `background_ssim` are outside, `change_inside` is the mean difference inside, from 0 to
    1; `flicker` and `source_flicker` are how much brightness jumps back and forth. None is what cannot be measured.
    """
    import torch

    from vgen.metrics import fidelity

    one, other, inside = (torch.from_numpy(array) for array in (source, result, region))
    return _rounded(
        {
            "region": float(inside.mean()),
            "background_psnr": fidelity.psnr(one, other, 1 - inside),
            "background_ssim": fidelity.ssim(one, other, 1 - inside),
            "change_inside": fidelity.change(one, other, inside),
            "flicker": fidelity.flicker(other),
            "source_flicker": fidelity.flicker(one),
        }
    )


def _rounded(values: dict[str, float]) -> dict[str, float | None]:
    """Return numbers as JSON can hold them: None for what could not be measured."""
    return {name: None if math.isnan(value) else round(value, 4) for name, value in values.items()}
