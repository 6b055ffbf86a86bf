"""`vgen invert`: the noise that a clip comes from, for edits that begin from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vgen import outputs
from vgen.cli import edits, flags, progress
from vgen.cli.progress import say
from vgen.cli.results import Format
from vgen.editing.plan import plan as planned
from vgen.editing.request import EditRequest
from vgen.errors import UsageError

app = typer.Typer(add_completion=False)

EPILOG = """
[bold]Examples[/bold]

vgen invert clip.mp4 --source "a red ball moves right on grass" -o noise.safetensors

vgen edit clip.mp4 --noise noise.safetensors --target "a blue ball moves right on grass"
"""
SUFFIX = ".safetensors"


@app.command(epilog=EPILOG)
def invert(
    clip: Annotated[Path, typer.Argument(help=edits.CLIP, show_default=False)],
    source: edits.Source = None,
    model: edits.Model = None,
    lora: edits.Lora = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="euler, rf-solver or fireflow. [dim]Default: fireflow[/dim]",
            rich_help_panel=edits.HOW,
            metavar="NAME",
        ),
    ] = None,
    steps: edits.Steps = None,
    strength: edits.Strength = None,
    inject: Annotated[
        int | None,
        typer.Option(
            help="Keep V of self-attention of so many steps, for edits with --inject. [dim]Default: 0[/dim]",
            rich_help_panel=edits.HOW,
        ),
    ] = None,
    attention: edits.Attention = None,
    start: edits.Start = None,
    seconds: edits.Seconds = None,
    fit: edits.Fit = None,
    width: edits.Width = None,
    height: edits.Height = None,
    frames: edits.Frames = None,
    overlap: edits.Overlap = None,
    fps: edits.Fps = None,
    performance: flags.Performance = None,
    offload: flags.Offload = None,
    compiled: edits.Compiled = None,
    device: flags.PanelDevice = None,
    dtype: flags.PanelDtype = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A .safetensors file. [dim]Default: CLIP.noise.safetensors[/dim]",
            rich_help_panel=flags.OUTPUT,
            show_default=False,
        ),
    ] = None,
    force: flags.PanelForce = False,
    dry_run: flags.DryRun = False,
    form: flags.PanelForm = Format.text,
) -> None:
    """Follow a clip to the noise that it comes from, measure the way back, and keep the noise for vgen edit."""
    given: dict[str, Any] = {
        "source": source,
        "model": model,
        "lora": lora or None,
        "method": method,
        "num_inference_steps": steps,
        "strength": strength,
        "inject": inject,
        "attention": attention,
        "start": start,
        "seconds": seconds,
        "fit": fit,
        "width": width,
        "height": height,
        "num_frames": frames,
        "overlap": overlap,
        "fps": fps,
        "performance": performance,
        "offload": offload,
        "compile": compiled,
        "device": device,
        "dtype": dtype,
    }
    given = {name: value for name, value in given.items() if value is not None}
    path = output or clip.parent / f"{clip.name or 'clip'}.noise{SUFFIX}"
    if path.suffix != SUFFIX:
        raise UsageError(f'"{path.name}" does not end in {SUFFIX}.', tip=f"use -o noise{SUFFIX}.")
    plan = planned(EditRequest(video=clip, **given))
    for note in plan.notes:
        say(note)
    if not force:
        outputs.refuse_existing(path)
    if dry_run:
        edits.show_plan(plan, path, form)
        return
    outputs.prepare_folder(path)
    from vgen.pipelines import edit as pipeline

    with progress.shown(1) as watch:
        report = pipeline.run_inversion(plan, path, watch=watch)
    edits.show_report(report, plan.seed, form)
