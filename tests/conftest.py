"""Checkpoints that several test files share, built once per run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import hub_server, tiny
from tests.hub_server import Hub, Repository

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


@pytest.fixture
def online(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve the tiny checkpoint, with what is not needed of it, and point the hub's client there."""
    import huggingface_hub
    from huggingface_hub import constants

    files = {**hub_server.files_of(tiny_checkpoint), **hub_server.NOT_NEEDED}
    with hub_server.serving(Hub({hub_server.TINY: Repository({"main": files})})) as served:
        huggingface_hub.close_session()
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        template = f"{served.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield served
        huggingface_hub.close_session()
