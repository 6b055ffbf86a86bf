"""`vgen doctor`: the real checks on this machine, and what they say of what is broken."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.hub_server import Hub
from vgen import checkpoints, cli, doctor
from vgen.doctor import Check, Finding
from vgen.errors import VgenError


def ask(name: str) -> Finding:
    """Return the last finding of one check."""
    return doctor.examine({name: doctor.CHECKS[name]})[-1]


def test_it_says_that_videos_can_be_made_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.stdout
    lines = result.stdout.splitlines()
    assert lines[-1] == "vgen generate works here."
    assert lines[0].startswith("ok       versions")
    assert any(line.startswith("note     hub") and "offline" in line for line in lines)
    assert "hf_secret" not in result.stdout


def test_problems_and_what_crashes_or_hangs_are_lines_and_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fine() -> Iterator[Finding]:
        yield Finding(name="fine", level="ok", says="yes")

    def crashes() -> Iterator[Finding]:
        raise KeyError("a bug")

    def refuses() -> Iterator[Finding]:
        raise VgenError("no", tip="do this")

    def hangs() -> Iterator[Finding]:
        threading.Event().wait()
        yield from ()

    checks = {
        "crashes": Check(run=crashes, needed=True),
        "hangs": Check(run=hangs, needed=False, seconds=0.2),
        "refuses": Check(run=refuses, needed=True),
        "fine": Check(run=fine, needed=True),
    }
    monkeypatch.setattr(doctor, "CHECKS", checks)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "problem  crashes  KeyError: 'a bug'",
        f"                  fix: {doctor.REINSTALL}",
        "note     hangs    no answer in 0.2 s",
        "problem  refuses  no",
        "                  fix: do this",
        "ok       fine     yes",
        "",
        "2 problems are in the way of vgen generate.",
    ]
    printed = json.loads(CliRunner().invoke(cli.app, ["doctor", "--format", "json"]).stdout)
    assert printed["works"] is False
    assert printed["findings"][-1] == {"name": "fine", "level": "ok", "says": "yes", "fix": None}


def test_the_hub_is_asked_where_it_is(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ask("hub").level, "without a token" in ask("hub").says) == ("ok", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert ask("hub").says.endswith("answers, with a token")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert ask("hub").level == "note"
    assert "does not answer" in ask("hub").says


def test_a_damaged_checkpoint_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = checkpoints.resolve("toyland")
    assert embedded.folder is not None
    assert ask("toyland").level == "ok"
    folder = Path(shutil.copytree(embedded.folder, tmp_path / "copy"))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    monkeypatch.setattr(checkpoints, "resolve", lambda _: replace(embedded, folder=folder))
    found = ask("toyland")
    assert found.level == "problem"
    assert found.fix is not None
    assert weights.name in found.says


def test_an_ffmpeg_without_the_encoders_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text("#!/bin/sh\necho ' V....D libx264 H.264'\necho ' A....D aac AAC'\n", encoding="utf-8")
    ffmpeg.chmod(0o755)
    assert ask("ffmpeg").level == "ok"
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    found = ask("ffmpeg")
    assert (found.level, found.says) == ("problem", f"{ffmpeg} has no libvpx-vp9 and no libopus.")


def test_a_package_that_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("raise ImportError('built for another torch')", encoding="utf-8")
    described = tmp_path / "broken-1.2.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.2\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "PACKAGES", {"broken": ("broken", "attention is slow")})
    found = ask("packages")
    assert found.level == "note"
    assert found.says == "1.2 cannot be imported: attention is slow (ImportError: built for another torch)"
    monkeypatch.setattr(doctor, "PACKAGES", {"absent": ("absent", "attention is slow")})
    assert ask("packages").says == "not installed: attention is slow"


def test_an_output_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ask("output").level == "ok"
    Path("outputs").write_text("a file", encoding="utf-8")
    assert (ask("output").level, ask("output").fix) == ("problem", "free some, or write elsewhere with --output")
    Path("outputs").unlink()
    monkeypatch.setattr(doctor, "SPACE_TO_WRITE", 10**18)
    assert "which is little" in ask("output").says


def test_the_processor_and_the_dtype_are_those_of_this_machine() -> None:
    assert "threads" in ask("cpu").says
    assert ask("dtype").level == "ok"


def test_kernels_that_cannot_be_compiled_are_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from vgen.attention.kernels import cpu as sparse
    from vgen.attention.kernels import dense
    from vgen.quantization import cpu as integers

    monkeypatch.setattr(sparse, "why_not_compiled", lambda: None)
    monkeypatch.setattr(integers, "why_not_compiled", lambda: "there is no C++ compiler")
    monkeypatch.setattr(dense, "why_not_compiled", lambda: "it needs an x86 CPU with AVX-512 BF16")
    told = doctor.examine({"cpu-kernels": doctor.CHECKS["cpu-kernels"]})
    assert [(one.level, one.fix) for one in told] == [("ok", None), ("note", "install g++"), ("note", None)]
    assert told[1].says == "integer layers: torch's own, which is slower, as there is no C++ compiler"
