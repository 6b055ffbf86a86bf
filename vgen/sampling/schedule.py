"""Noise levels that do not come from a scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Level = TypeVar("Level", float, "Tensor")


def shifted(sigma: Level, shift: float) -> Level:
    """Return the level that a flow's schedule is shifted to (Esser et al. 2024, arXiv:2403.03206, equation 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def at_timesteps(timesteps: Sequence[int], shift: float | None) -> Tensor:
    """Return sigmas float32 [N + 1] for the timesteps, of 1000, that a student was distilled for, and then 0."""
    import torch

    return torch.tensor([*(shifted(timestep / 1000, shift or 1.0) for timestep in timesteps), 0.0])
