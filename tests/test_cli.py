"""The command line as a whole: starting up, help, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vgen
from vgen import cli
from vgen.errors import UsageError, VgenError

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "numpy", "diffusers", "transformers", "PIL", "imageio_ffmpeg", "huggingface_hub")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "vgen", *arguments], capture_output=True, text=True, cwd=ROOT)


BARE = """import sys, typer
app = typer.Typer()
@app.command()
def bare() -> None: ...
sys.argv = ["bare", "--help"]
app()
"""


def processor_time(*command: str) -> float:
    """Return what a command takes, which other work on the machine hardly lengthens."""
    before = os.times()
    subprocess.run([sys.executable, *command], capture_output=True, cwd=ROOT, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_start_up_takes_little_more_than_typer_alone(option: str) -> None:
    """0.12 s for an empty command and 0.36 s for vgen, where that was measured; the best of three of each."""
    taken = [(processor_time("-m", "vgen", option), processor_time("-c", BARE)) for _ in range(3)]
    own, bare = (min(times) for times in zip(*taken, strict=True))
    assert own < 4 * bare


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["generate", "--help"], 0),
        (["generate"], 2),
        (["generate", "a", "--model", "toylnd"], 2),
        (["generate", "a", "--width", "100"], 2),
        (["generate", "a", "--frames", "18"], 2),
        (["generate", "a", "--sampler", "oiler"], 2),
        (["generate", "a", "--device", "gpu"], 2),
        (["generate", "a", "-o", "clip.avi"], 2),
        (["generate", "a", "--prompts", "missing.txt"], 2),
        (["generate", "--prompts", "missing.txt"], 1),
        (["generate", "--from", "missing.mp4"], 1),
        (["generate", "a", "-o", "pyproject.toml/clip.mp4"], 1),
        (["generate", "a", "--dry-run"], 0),
        (["eval", "--prompts", "1"], 2),
        (["eval", "--model", "toylnd"], 2),
    ],
)
def test_nothing_heavy_is_loaded_before_the_request_is_right(arguments: list[str], code: int) -> None:
    program = f"""
import sys
from vgen.cli import app
try:
    app({arguments!r})
except SystemExit as stop:
    print("exit", stop.code, [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == f"exit {code} []", done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("error", "code"), [(VgenError("no", tip="yes"), 1), (UsageError("no", tip="yes"), 2)])
def test_errors_become_a_message_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: VgenError, code: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("vgen.batch.plan_lines", fail)
    result = CliRunner().invoke(cli.app, ["generate", "a"])
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "Error: no\nTip: yes\n")


def test_version_is_the_package_version() -> None:
    assert run("--version").stdout == f"vgen {vgen.__version__}\n"


def test_help_names_every_command_and_every_command_has_help() -> None:
    listed = CliRunner().invoke(cli.app, ["--help"]).output
    for command in cli.COMMANDS:
        assert command in listed
        result = CliRunner().invoke(cli.app, [command, "--help"])
        assert result.exit_code == 0
        assert "Usage:" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["genrate", "a"], "generate"), (["generate", "a", "--sedd", "1"], "--seed"), (["generate", "a", "b"], "b")],
)
def test_mistyped_words_are_usage_errors(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert says in result.stderr


def test_a_prompt_without_quotes_gets_the_tip() -> None:
    result = CliRunner().invoke(cli.app, ["generate", "a", "red", "ball"])
    assert result.exit_code == 2
    assert "(red ball)" in result.stderr
    assert 'in quotes: vgen generate "a red ball"' in result.stderr


def test_what_the_machine_refuses_is_an_error_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(cli.app, ["info", "x" * 300])
    assert result.exit_code == 1
    assert result.stderr.endswith("File name too long.\nTip: check the path.\n")

    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("vgen.batch.plan_lines", fail)
    result = CliRunner().invoke(cli.app, ["generate", "a"])
    assert (result.exit_code, result.stderr.splitlines()[0]) == (1, "Error: The memory ran out.")

    def has_a_bug(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("vgen.batch.plan_lines", has_a_bug)
    assert isinstance(CliRunner().invoke(cli.app, ["generate", "a"]).exception, RuntimeError)


def test_what_the_terminal_cannot_show_is_escaped() -> None:
    program = [sys.executable, "-m", "vgen", "generate", "ein grüner Ball", "--dry-run", "-o", b"\xff.mp4"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(program, capture_output=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == rb"\udcff.mp4"
    assert rb"prompt: ein gr\xfcner Ball" in done.stdout


def test_closed_pipe_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-m", "vgen", "generate", "a", "--dry-run"]
    done = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    os.close(writer)
    assert "Traceback" not in done.stderr
