"""Clips to a model's size, length and rate and back, and masks between pixels and latents."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vgen.editing import fitting, masks

sides = st.integers(16, 90)


def smooth(width: int, height: int, num_frames: int = 1) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([255 * x / width, 255 * y / height, np.full_like(x, 90.0)], -1)
    return np.broadcast_to(picture, (num_frames, height, width, 3)).astype(np.uint8).copy()


@settings(max_examples=40)
@given(size=st.tuples(sides, sides), view=st.tuples(sides, sides), way=st.sampled_from(fitting.WAYS))
def test_a_clip_comes_back_where_it_was(size: tuple[int, int], view: tuple[int, int], way: str) -> None:
    frames = smooth(*size)
    fit = fitting.fit(size, view, way)
    seen = fit.frames(frames)
    assert seen.shape == (1, view[1], view[0], 3)
    part, where = fit.back(torch.from_numpy(seen).permute(0, 3, 1, 2))
    true = frames[0][where]
    assert part.shape[2:] == true.shape[:2]
    if way == "pad":
        assert true.shape[:2] == (size[1], size[0])
    # Within a pixel or two of a picture that rises by 255 over its width.
    off = np.abs(part[0].permute(1, 2, 0).numpy() - true).mean((0, 1))
    steps = [max(1 / s, 1 / v) for s, v in zip(size, fit.scaled, strict=True)]
    assert off[0] <= 2 * 255 * steps[0] + 1
    assert off[1] <= 2 * 255 * steps[1] + 1


def test_padding_shows_all_and_cropping_fills() -> None:
    wide = np.zeros((1, 32, 96, 3), np.uint8)
    wide[:, :, 90:] = 255
    padded = fitting.fit((96, 32), (48, 48), "pad")
    cropped = fitting.fit((96, 32), (48, 48), "crop")
    assert padded.frames(wide)[0, 24, -2:].min() > 200
    assert cropped.frames(wide).max() == 0
    assert cropped.back(torch.zeros(1, 3, 48, 48))[1] == (slice(0, 32), slice(32, 64))
    assert "padded" in (padded.note() or "")
    assert "stays as it is" in (cropped.note() or "")
    assert fitting.fit((48, 48), (48, 48), "pad").note() is None


@pytest.mark.parametrize(
    ("size", "seen"),
    [((128, 96), (128, 96)), ((130, 96), (192, 128)), ((1920, 1080), (192, 128)), ((1080, 1920), (128, 192))],
)
def test_the_view_is_the_clips_size_or_the_native_one_of_its_shape(
    size: tuple[int, int], seen: tuple[int, int]
) -> None:
    native = [(128, 128), (192, 128), (128, 192)]
    assert fitting.view_of(size, native, multiple=16, most=1024) == seen


@given(num_frames=st.integers(1, 200), window=st.integers(1, 40), overlap=st.integers(0, 39))
def test_windows_cover_a_clip_and_overlap(num_frames: int, window: int, overlap: int) -> None:
    overlap = min(overlap, window - 1)
    found = fitting.windows(num_frames, window, overlap)
    assert found[0].start == 0
    assert found[-1].start + window >= num_frames
    if num_frames > window:
        assert found[-1].start + window == num_frames
    for one, after in itertools.pairwise(found):
        assert overlap <= one.start + window - after.start < window
    values = np.arange(num_frames, dtype=np.float32)
    parts = [torch.from_numpy(one.of(values)) for one in found]
    assert torch.allclose(fitting.joined(parts, found, num_frames), torch.from_numpy(values), atol=1e-3)


def test_windows_fade_into_each_other() -> None:
    found = fitting.windows(7, 5, 3)
    joined = fitting.joined([torch.zeros(5, 1), torch.ones(5, 1)], found, 7)[:, 0]
    assert joined.tolist() == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1])


def test_a_latent_mask_is_true_where_any_of_its_pixels_may_change() -> None:
    mask = np.zeros((9, 32, 32), np.float32)
    mask[0, 0, 0] = mask[6, 31, 31] = 1
    found = masks.to_latents(mask, (3, 4, 4))
    assert found.shape == (1, 1, 3, 4, 4)
    assert found.nonzero().tolist() == [[0, 0, 0, 0, 0], [0, 0, 2, 3, 3]]
    pixels = masks.to_pixels(found, 9, 32, 32)
    assert (pixels.numpy() >= mask).all()
    assert pixels.amax((1, 2)).tolist() == [1, 0, 0, 0, 0, 1, 1, 1, 1]


def test_a_border_fades_outside_only() -> None:
    mask = torch.zeros(1, 40, 40)
    mask[:, 10:30, 10:30] = 1
    faded = masks.soft(mask, 8)
    assert (faded[mask == 1] == 1).all()
    assert (faded[0, :1] == 0).all()
    row = faded[0, 20, :11]
    assert (row.diff() >= 0).all()
    assert 0 < row[5] < 1
    assert torch.equal(masks.soft(mask, 0), mask)


def test_a_kept_clip_is_seen_outside_of_the_mask() -> None:
    data, noise, mask = torch.ones(1, 2, 1, 2, 2), torch.zeros(1, 2, 1, 2, 2), torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    seen = []

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(latents)
        return latents

    masks.kept(velocity, data, noise, mask)(torch.full_like(data, 9), torch.tensor(0.25))
    assert seen[0][0, 0, 0].tolist() == [[9, 0.75], [pytest.approx(4.875), 0.75]]


def test_renewed_noise_is_as_strong_as_before_and_the_same_outside_of_a_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, fresh = torch.randn(2, 1, 4, 5, 64, 64, generator=generator)
    mask = torch.zeros(1, 1, 5, 64, 64)
    mask[..., 32:] = 1
    made = masks.renewed(noise, fresh, 0.7 * mask)
    assert torch.equal(made[..., :32], noise[..., :32])
    assert made[..., 32:].std() == pytest.approx(1, abs=0.02)
    assert (made * fresh)[..., 32:].mean() == pytest.approx(0.7, abs=0.02)
    assert torch.equal(masks.renewed(noise, fresh, mask)[..., 32:], fresh[..., 32:])


def test_the_difference_of_two_flows_is_found_where_it_is() -> None:
    data = torch.zeros(1, 4, 2, 12, 12)
    pushed = torch.zeros_like(data)
    pushed[:, :, 1, 3:6, 7:10] = 1
    noise = torch.Generator().manual_seed(0)
    found = masks.difference(
        lambda x, sigma: x, lambda x, sigma: x + pushed, data, lambda: torch.randn(data.shape, generator=noise)
    )
    mask = masks.from_difference(found)
    # Its corners, of whose neighbours most are the same for both, are left to the soft border.
    assert mask[0, 0, 1, 3:6, 8].min() == mask[0, 0, 1, 4, 7:10].min() == 1
    assert mask[0, 0, 0].max() == 0
    assert mask.mean() < 0.2


def test_what_differs_nearly_everywhere_is_edited_as_a_whole() -> None:
    found = torch.linspace(0.3, 1, 1000).reshape(5, 10, 20)
    assert masks.from_difference(found).min() == 1
    some = torch.where(torch.arange(20) < 6, 0.8, 0.1).expand_as(found)
    assert masks.from_difference(some)[..., :6].min() == 1
    assert masks.from_difference(some)[..., 6:].max() == 0
