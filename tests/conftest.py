"""Checkpoints that several test files share, built once per run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests import tiny

# A machine that does something else at the same time is slow now and then; that is no failure.
settings.register_profile("vgen", deadline=None)
settings.load_profile("vgen")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Wan checkpoint with one timestep for all tokens. Do not write to it."""
    return tiny.build(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def tiny_expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Wan checkpoint with a timestep per token, which takes known frames. Do not write to it."""
    return tiny.build(tmp_path_factory.mktemp("checkpoints") / "tiny-expanded", expand_timesteps=True)
