"""`vgen models`: which checkpoints there are, and how they get here."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from vgen import backbones, checkpoints, hub
from vgen.checkpoints import Checkpoint
from vgen.cli import flags, progress, results
from vgen.cli.progress import say
from vgen.cli.results import Format
from vgen.errors import CheckpointError
from vgen.hub import readable

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Checkpoints: which there are, what they take and can do, and how they get onto this machine.",
)

EPILOG = """
[bold]Examples[/bold]

vgen models list

vgen models show wan2.1-1.3b [dim]# what it needs and what would be downloaded, before anything is[/dim]

vgen models pull wan2.1-1.3b

vgen generate "a cat walks on the grass" --model wan2.1-1.3b
"""

Model = Annotated[str, typer.Argument(help="A name of the list, a hub id, or a folder.", show_default=False)]


@app.callback(epilog=EPILOG)
def _models() -> None:
    pass


@app.command("list")
def list_(form: flags.Form = Format.text) -> None:
    """List the checkpoints that have a name."""
    found = [checkpoints.resolve(name) for name in checkpoints.names()]
    if form is Format.json:
        print(json.dumps([{**results.facts(checkpoint), "state": _state(checkpoint)} for checkpoint in found]))
        return
    rows = [("NAME", "FROM", "DOWNLOAD", "WEIGHTS IN MEMORY", "LICENCE", "STATE")]
    rows += [(c.name, _takes(c), _download(c), _memory(c), c.licence, _state(c)) for c in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def show(model: Model, form: flags.Form = Format.text) -> None:
    """Tell what a checkpoint is, takes, can do and needs, and what pulling it would download."""
    checkpoint = checkpoints.resolve(model)
    facts = {**results.facts(checkpoint), "state": _state(checkpoint)}
    if checkpoint.repo is not None and not checkpoints.is_whole(checkpoint):
        facts["download"] = _would_download(checkpoint)
    if form is Format.json:
        print(json.dumps(facts))
    else:
        results.show_facts(facts)


@app.command()
def pull(
    model: Model,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit. [dim]Default: the newest[/dim]", show_default=False)
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Hash what is here, too, and get damaged files anew.")] = False,
) -> None:
    """Download a checkpoint, check it against the hub's hashes, and print its folder. What is here already stays."""
    checkpoint = checkpoints.resolve(model)
    with progress.downloads() as told:
        checkpoint = checkpoints.pull(checkpoint, told, revision=revision, full=full)
    say(f"{checkpoint.name} is whole, as of commit {checkpoint.revision}.")
    print(checkpoint.folder)


@app.command()
def verify(
    model: Model,
    full: Annotated[bool, typer.Option("--full", help="Compare hashes, too: a second for each GB.")] = False,
) -> None:
    """Check that every file of a checkpoint is here and whole."""
    checkpoint = checkpoints.resolve(model)
    checkpoints.verify(checkpoint, full=full)
    print(f"{checkpoint.name} is whole: {'sizes and hashes match' if full else 'sizes match'}.")


@app.command()
def path(model: Model) -> None:
    """Print the folder that a checkpoint is in."""
    checkpoint = checkpoints.resolve(model)
    if checkpoint.folder is None:
        raise CheckpointError(
            f'"{checkpoint.name}" was not downloaded.', tip=f"get it with: vgen models pull {checkpoint.name}"
        )
    print(checkpoint.folder)


def _takes(checkpoint: Checkpoint) -> str:
    can = checkpoint.can
    words = {"text": can.text_to_video, "image": can.image_to_video, "face": can.identity}
    return ", ".join(word for word, true in words.items() if true)


def _download(checkpoint: Checkpoint) -> str:
    if checkpoint.files:
        return readable(sum(file.size for file in checkpoint.files))
    return f"{checkpoint.download_gb:.1f} GB" if checkpoint.download_gb else "see show"


def _memory(checkpoint: Checkpoint) -> str:
    whole, offload = checkpoint.weights_gb(), checkpoint.weights_gb(offload=True)
    return f"{whole:.1f} GB, offloaded {offload:.1f} GB" if whole is not None and offload is not None else ""


def _state(checkpoint: Checkpoint) -> str:
    try:
        backbones.require_runnable(checkpoint)
    except CheckpointError:
        return "cannot run yet"
    if checkpoint.source == "embedded":
        return "part of vgen"
    return "here" if checkpoints.is_whole(checkpoint) else "not downloaded"


def _would_download(checkpoint: Checkpoint) -> dict[str, Any] | None:
    try:
        parts = checkpoints.remote(checkpoint)
    except CheckpointError as error:
        say(f"What would be downloaded is not known here. {error}")
        return None
    absent = [file for part in parts for file in hub.missing(part)]
    return {
        "commit": parts[0].commit,
        "to_download": readable(sum(file.size for file in absent)),
        "on_disk": readable(sum(part.size for part in parts)),
        "missing": [asdict(file) for file in absent],
    }
