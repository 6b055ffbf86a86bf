"""How near a video is to another, all over or in a region of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

SSIM_WINDOW, SSIM_DEVIATION = 11, 1.5  # pixels
LIMITLESS = 100.0  # dB that stand for two videos that are the same


def psnr(first: Tensor, second: Tensor, weight: Tensor | None = None) -> float:
    """Return the peak signal-to-noise ratio of frames uint8 [F, H, W, 3] in dB, at most `LIMITLESS`.

    With `weight` [F, H, W], from 0 to 1, as much as each pixel counts. NaN where nothing counts.
    """
    mean = _mean(lambda one, other: (one - other).square().mean(-1), first, second, weight)
    if math.isnan(mean):
        return mean
    return LIMITLESS if mean == 0 else min(LIMITLESS, 10 * math.log10(255**2 / mean))


def ssim(first: Tensor, second: Tensor, weight: Tensor | None = None) -> float:
    """Return the structural similarity of frames uint8 [F, H, W, 3], the mean over pixels, or as `weight` counts them.

    By a Gaussian window on each channel (Wang et al. 2004, IEEE TIP 13(4)). NaN where nothing counts, and for frames
    smaller than the window.
    """
    if min(first.shape[1:3]) < SSIM_WINDOW or (weight is not None and not weight.any()):
        return math.nan
    similarity = torch.cat([_similarity(a[None], b[None]) for a, b in zip(first, second, strict=True)])
    if weight is None:
        return float(similarity.mean())
    edge = SSIM_WINDOW // 2
    inner = weight.float()[:, edge:-edge, edge:-edge]
    return float((similarity * inner).sum() / inner.sum()) if inner.any() else math.nan


def _similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return the map [F, H - 10, W - 10] of frames uint8 [F, H, W, 3]."""
    x, y = first.permute(3, 0, 1, 2).float() / 255, second.permute(3, 0, 1, 2).float() / 255
    places = torch.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    bell = torch.exp(-places.square() / (2 * SSIM_DEVIATION**2))
    bell = (bell / bell.sum()).to(x.device)

    def smooth(picture: Tensor) -> Tensor:
        shape = picture.shape
        flat = picture.reshape(-1, 1, *shape[2:])
        flat = nn.functional.conv2d(nn.functional.conv2d(flat, bell.view(1, 1, 1, -1)), bell.view(1, 1, -1, 1))
        return flat.view(*shape[:2], *flat.shape[2:])

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    ratio = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (ratio / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean(0)


def change(first: Tensor, second: Tensor, weight: Tensor | None = None) -> float:
    """Return the mean absolute difference of frames uint8 [F, H, W, 3], from 0 to 1, as `weight` counts pixels."""
    return _mean(lambda one, other: (one - other).abs().mean(-1) / 255, first, second, weight)


def flicker(frames: Tensor) -> float:
    """Return how much brightness jumps back and forth, in [0, 1]: |f(t-1) - 2 f(t) + f(t+1)| / 2, the mean over all.

    On frames uint8 [F, H, W, 3] made eight times smaller, where steady movement cancels out and unsteady light does
    not. 0 for fewer than three frames.
    """
    if len(frames) < 3:
        return 0.0
    side = max(1, min(8, *frames.shape[1:3]))
    coarse = torch.cat([nn.functional.avg_pool2d(one.permute(2, 0, 1)[None].float() / 255, side) for one in frames])
    return float((coarse[:-2] - 2 * coarse[1:-1] + coarse[2:]).abs().mean() / 2)


def _mean(of: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor, weight: Tensor | None) -> float:
    """Return the mean of `of` two frames, [H, W], over pixels and frames; one frame at a time, as clips are large."""
    total = counted = 0.0
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        found = of(one.float(), other.float()).double()
        share = torch.ones_like(found) if weight is None else weight[number].double()
        total += float((found * share).sum())
        counted += float(share.sum())
    return total / counted if counted else math.nan
