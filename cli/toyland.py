"""`vgen toyland`: the rendered world that the embedded model learned from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from vgen import files, outputs
from vgen.errors import VgenError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="The rendered world that the embedded model knows.")

EPILOG = """
[bold]Examples[/bold]

vgen toyland render -o outputs/toyland

vgen toyland render -n 4 --seed 7 --width 256 --height 256 --frames 33 -o outputs/large
"""


# What a folder of clips holds, and so the only things that --force may take away.
RENDERED = re.compile(r"\d{3,}\.(mp4|json|npz)|sheet\.png")


@app.callback()
def _toyland() -> None:
    pass


@app.command(epilog=EPILOG)
def render(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")] = Path("outputs/toyland"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many clips.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="The same seed renders the same clips.")] = 0,
    width: Annotated[int, typer.Option(min=16, max=4096, help="In pixels.")] = 128,
    height: Annotated[int, typer.Option(min=16, max=4096, help="In pixels.")] = 128,
    frames: Annotated[int, typer.Option(min=1, max=100_000, help="How many frames.")] = 17,
    fps: Annotated[float, typer.Option(min=1, max=240, help="Frames a second.")] = 8,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that exists.")] = False,
) -> None:
    """Render sample clips with their truth (JSON and npz) and a contact sheet."""
    if not force:
        outputs.refuse_existing(output)
    elif output.is_dir() and any(not RENDERED.fullmatch(file.name) for file in output.iterdir()):
        raise VgenError(f"{output} is a folder that holds other things than clips.", tip="choose another --output.")
    from vgen.toyland import samples

    outputs.prepare_folder(output)
    with files.atomic(output) as folder:
        samples.write(folder, count=count, seed=seed, width=width, height=height, num_frames=frames, fps=fps)
    print(output)
