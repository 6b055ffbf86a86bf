"""`vgen info`: what a video or a checkpoint is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vgen import checkpoints, manifest
from vgen.cli.results import Format

app = typer.Typer(add_completion=False)

EPILOG = """
[bold]Examples[/bold]

vgen info clip.mp4

vgen info toyland

vgen info clip.mp4 --format json | jq .request.prompt
"""


@app.command(epilog=EPILOG)
def info(
    what: Annotated[
        str,
        typer.Argument(
            help="A video that vgen made or its .json; or a checkpoint: its name, folder or hub id.",
            show_default=False,
        ),
    ],
    form: Annotated[Format, typer.Option("--format", help="For people or for programs.")] = Format.text,
) -> None:
    """Tell how a video was made, or what a checkpoint is and takes."""
    path = Path(what)
    is_checkpoint = (path / "model_index.json").is_file() or not (path.exists() or path.suffix)
    facts = _checkpoint(what) if is_checkpoint or what in checkpoints.names() else manifest.read(path)
    if form is Format.json:
        print(json.dumps(facts))
    else:
        _print(facts)


def _checkpoint(model: str) -> dict[str, Any]:
    found = checkpoints.resolve(model)
    facts = asdict(found)
    return {**facts, "folder": str(found.folder) if found.folder else None, "files": manifest.identity(found)["files"]}


def _print(facts: dict[str, Any], indent: str = "") -> None:
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print(value, indent + "  ")
        elif name == "files":
            print(f"{indent}files:")
            for file in value:
                print(f"{indent}  {file['path']}  {file['size']} bytes  sha256 {file['sha256'] or 'not computed'}")
        else:
            print(f"{indent}{name}: {'' if value is None else value}")
