"""`vgen info`: what a video or a checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vgen import checkpoints, manifest, outputs
from vgen.cli import flags, results
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
    form: flags.Form = Format.text,
) -> None:
    """Tell how a video was made, or what a checkpoint is and takes."""
    path = Path(what)
    named_as_video = path.suffix.lower() in (*outputs.SUFFIXES, ".json")
    is_checkpoint = (path / "model_index.json").is_file() or not (path.exists() or named_as_video)
    is_checkpoint = is_checkpoint or what in checkpoints.names()
    facts = results.facts(checkpoints.resolve(what)) if is_checkpoint else manifest.read(path)
    if form is Format.json:
        print(json.dumps(facts))
    else:
        results.show_facts(facts)
