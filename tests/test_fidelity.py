from __future__ import annotations

import math

import pytest
import torch

from vgen.metrics import fidelity
from vgen.toyland import readings

FRAMES = torch.randint(0, 256, (4, 24, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_psnr_is_that_of_the_mean_square() -> None:
    assert fidelity.psnr(FRAMES, FRAMES) == fidelity.LIMITLESS
    grey = torch.full((1, 8, 8, 3), 100, dtype=torch.uint8)
    assert fidelity.psnr(grey, grey + 10) == pytest.approx(10 * math.log10(255**2 / 100))


def test_what_is_weighted_zero_does_not_count() -> None:
    other = FRAMES.clone()
    other[:, :12] = 0
    lower = torch.zeros(4, 24, 32)
    lower[:, 12:] = 1
    assert fidelity.psnr(FRAMES, other, lower) == fidelity.LIMITLESS
    assert fidelity.change(FRAMES, other, lower) == 0
    assert fidelity.change(FRAMES, other, 1 - lower) == pytest.approx(
        float(FRAMES[:, :12].float().mean() / 255), rel=1e-4
    )
    assert math.isnan(fidelity.psnr(FRAMES, other, torch.zeros(4, 24, 32)))


def test_ssim_is_that_of_the_definition_at_a_pixel() -> None:
    first, second = FRAMES[:1, :11, :11], FRAMES[1:2, :11, :11]
    bell = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weight = torch.outer(bell, bell) / torch.outer(bell, bell).sum()
    expected = []
    for channel in range(3):
        x, y = first[0, ..., channel] / 255, second[0, ..., channel] / 255
        mx, my = (weight * x).sum(), (weight * y).sum()
        vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
        cov = (weight * (x - mx) * (y - my)).sum()
        c1, c2 = 1e-4, 9e-4
        expected.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert fidelity.ssim(first, second) == pytest.approx(float(sum(expected) / 3), abs=1e-5)
    assert fidelity.ssim(FRAMES, FRAMES) == pytest.approx(1, abs=1e-5)
    assert math.isnan(fidelity.ssim(FRAMES[:, :8], FRAMES[:, :8]))


def test_flicker_is_that_of_the_readings() -> None:
    assert fidelity.flicker(FRAMES) == pytest.approx(readings.flicker(FRAMES), abs=1e-6)
    assert fidelity.flicker(FRAMES[:2]) == 0
