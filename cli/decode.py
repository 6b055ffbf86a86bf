"""`vgen decode`: latents that a run left, to a video."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vgen import checkpoints, outputs
from vgen import latents as kept
from vgen.batch import PlannedLine
from vgen.cli import edits, flags, progress, results
from vgen.cli.results import Format
from vgen.pipelines import run
from vgen.plan import plan

app = typer.Typer(add_completion=False)

EPILOG = """
[bold]Examples[/bold]

vgen decode clip.mp4.latents.safetensors [dim]# makes clip.mp4[/dim]

vgen decode clip.mp4.latents.safetensors -o clip.gif
"""


@app.command(epilog=EPILOG)
def decode(
    latents: Annotated[
        Path, typer.Argument(help="A file that a failed run or --keep-latents left.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="As for vgen generate. [dim]Default: the name the run was to have[/dim]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help=f"{flags.DEVICE} [dim]Default: the run's[/dim]")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{flags.DTYPE} [dim]Default: the run's[/dim]")] = None,
    performance: Annotated[
        str | None, typer.Option(help="memory: decode in tiles. [dim]Default: where memory does not suffice[/dim]")
    ] = None,
    force: flags.Force = False,
    form: flags.Form = Format.text,
) -> None:
    """Finish a run whose decoding failed; its latents stay."""
    from vgen.editing.latents import is_edit
    from vgen.pipelines import edit

    if is_edit(latents):
        changes = {"device": device, "dtype": dtype, "performance": performance}
        given = {name: value for name, value in changes.items() if value is not None}
        path = outputs.video_path(latents)
        if output is not None:
            path = output / path.name if outputs.is_folder(output) else output
        outputs.check_suffix(path)
        job = edit.decoding(latents, path, {**given, "offload": "auto"})
        outputs.check(job.output, force=force, begins=False)
        outputs.prepare_folder(job.output)
        with progress.shown(num_jobs=1) as watch:
            report = run.decode(latents, job, watch=watch)
        edits.show_report(report, job.plan.seed, form)
        return
    _, request = kept.load(latents)
    # Of the models the VAE alone is loaded: there is nothing to offload.
    request = replace(
        request,
        device=device or request.device,
        dtype=dtype or request.dtype,
        performance=performance or request.performance,
        offload="auto",
    )
    planned = PlannedLine(label="", number=None, plan=plan(request, checkpoints.resolve(request.model)))
    (job,) = run.jobs([planned], output or outputs.video_path(latents))
    outputs.check(job.output, force=force, begins=False)
    outputs.prepare_folder(job.output)
    with progress.shown(num_jobs=1) as watch:
        report = run.decode(latents, job, watch=watch)
    results.show_report(report, form)
