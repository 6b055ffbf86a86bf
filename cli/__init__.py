"""The command line: parses, calls, prints."""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

import vgen
from vgen.errors import UsageError, VgenError, did_you_mean, of_the_machine

# Command -> the module whose `app` it is, imported when the command is used.
COMMANDS = {
    "generate": "vgen.cli.generate",
    "edit": "vgen.cli.edit",
    "invert": "vgen.cli.invert",
    "decode": "vgen.cli.decode",
    "quantize": "vgen.cli.quantize",
    "compare": "vgen.cli.compare",
    "attention": "vgen.cli.attention",
    "eval": "vgen.cli.eval",
    "bench": "vgen.cli.bench",
    "info": "vgen.cli.info",
    "models": "vgen.cli.models",
    "doctor": "vgen.cli.doctor",
    "toyland": "vgen.cli.toyland",
    "train": "vgen.cli.train",
}

EPILOG = """
[bold]Begin with[/bold]

vgen generate "a red ball bounces on the grass"

Every command has its own help: vgen generate --help.

[dim]Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Results go to stdout, messages to stderr.[/dim]
"""


class Commands(TyperGroup):
    """Imports a command's module when it is asked for, and is the one place that turns errors into exit codes."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            known = ", ".join(COMMANDS)
            raise UsageError(
                f'There is no command "{cmd_name}".{did_you_mean(cmd_name, COMMANDS)}', tip=f"use {known}."
            )
        if cmd_name not in self.commands:
            self.commands[cmd_name] = command = get_command(importlib.import_module(COMMANDS[cmd_name]).app)
            command.name = cmd_name
        return self.commands[cmd_name]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except VgenError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            print(f"Interrupted. {interrupt}".strip(), file=sys.stderr)
            raise typer.Exit(130) from interrupt
        except BrokenPipeError as error:
            # The reader of our output (head, less) has gone; what Python would flush at exit has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from error
        except (OSError, RuntimeError, MemoryError) as error:
            if (told := of_the_machine(error)) is None:
                raise
            print(f"Error: {told}", file=sys.stderr)
            raise typer.Exit(told.exit_code) from error
        except Exception as error:
            # Typer's words for what, most often, is a prompt without quotes.
            if not str(error).startswith("Got unexpected extra argument"):
                raise
            print(f'Error: {error}.\nTip: put what has spaces in quotes: vgen generate "a red ball".', file=sys.stderr)
            raise typer.Exit(UsageError.exit_code) from error


app = typer.Typer(
    cls=Commands,
    help="Generate video with diffusion transformers. A small trained model is inside, so it works at once.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vgen {vgen.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; the console script `vgen`."""
    # A prompt or a file's name may hold what the terminal's encoding does not: it is printed with escapes.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    app()
