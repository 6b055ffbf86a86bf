"""What `vgen edit` and `vgen invert` share: options, the request, and how results are printed."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from vgen import batch, manifest, naming, outputs
from vgen.cli import flags, results
from vgen.cli.progress import say
from vgen.cli.results import Format
from vgen.editing.plan import EditPlan
from vgen.editing.request import EditRequest
from vgen.errors import UsageError, VgenError
from vgen.integrity import clip_sha256
from vgen.manifest import Manifest

if TYPE_CHECKING:
    from vgen.pipelines.run import Report

CLIP = "A video (mp4, mov, webm, mkv, gif) or a folder of pictures."
WHAT, HOW, FIT = "What to change", "How to change it", "What the model sees of the clip"

Source: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="What the clip shows. [dim]Default: nothing is said of it[/dim]", rich_help_panel=WHAT, show_default=False
    ),
]
Model: TypeAlias = Annotated[
    str | None,
    typer.Option(help=f"{flags.MODEL} [dim]Default: toyland[/dim]", rich_help_panel=HOW, metavar="NAME|FOLDER|ID"),
]
Steps: TypeAlias = Annotated[
    int | None, typer.Option(help="Steps of the whole way; the same there and back.", rich_help_panel=HOW)
]
Strength: TypeAlias = Annotated[
    float | None,
    typer.Option(
        help="How much of the way to noise is gone, from 0 to 1: less keeps more. [dim]Default: the method's[/dim]",
        rich_help_panel=HOW,
    ),
]
Inject: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="Steps in which V of self-attention is the source's: more keeps more. [dim]Default: 0[/dim]",
        rich_help_panel=HOW,
    ),
]
Start: TypeAlias = Annotated[float | None, typer.Option(help="Begin at this second.", rich_help_panel=FIT)]
Seconds: TypeAlias = Annotated[float | None, typer.Option(help="Take so much of the clip.", rich_help_panel=FIT)]
Fit: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="pad shows the model all of the clip; crop fills its frame, and leaves the rest as it is. "
        "[dim]Default: pad[/dim]",
        rich_help_panel=FIT,
        metavar="pad|crop",
    ),
]
Width: TypeAlias = Annotated[int | None, typer.Option(help="In pixels.", rich_help_panel=FIT)]
Height: TypeAlias = Annotated[int | None, typer.Option(help="In pixels.", rich_help_panel=FIT)]
Frames: TypeAlias = Annotated[
    int | None, typer.Option(help="How many frames at once, such as 17 or 33.", rich_help_panel=FIT)
]
Overlap: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="Frames that the parts of a long clip share. [dim]Default: a quarter[/dim]", rich_help_panel=FIT
    ),
]
Fps: TypeAlias = Annotated[
    float | None,
    typer.Option(
        help="Show the model so many frames per second. [dim]Default: all of them[/dim]", rich_help_panel=FIT
    ),
]
Lora: TypeAlias = Annotated[
    list[str] | None, typer.Option(help=flags.LORA, rich_help_panel=HOW, metavar="LORA[:SCALE]")
]
Attention: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Leave out most of self-attention, in the same places there and back: tile, sliding-tile or radial; for "
        "methods that do not invert also adaspa.",
        rich_help_panel=HOW,
        metavar="NAME",
    ),
]
Compiled: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help=f"{flags.COMPILE} Not with --inject.",
        rich_help_panel=flags.MACHINE,
        show_default=False,
    ),
]


def request(fields: dict[str, Any], from_: Path | None) -> tuple[EditRequest, Manifest | None]:
    """Return what is asked for, and the manifest that it is asked for by.

    Raises `VgenError` where that is of no edit, or its clip is another now.
    """
    if from_ is None:
        return EditRequest.from_dict(fields), None
    made_by = manifest.read(from_)
    if made_by.get("task") != "edit":
        raise UsageError(f"{from_} was not made by vgen edit.", tip=f"run it again with: vgen generate --from {from_}")
    asked = EditRequest.from_dict(batch.merge(made_by["request"], fields))
    was = {"video": asked.video, "noise": asked.noise}
    for name, path in was.items():
        if path is not None and name not in fields and clip_sha256(path) != made_by.get(f"{name}_sha256"):
            raise VgenError(f"{path} has changed since the video was made.", tip="give the file that it was made of.")
    return asked, made_by


def output_path(output: Path | None, plan: EditPlan) -> Path:
    """Return where the edit goes; a folder gets a name that tells of the target."""
    if output is None or outputs.is_folder(output):
        name = naming.default_name(plan.shown.prompt, plan.seed, datetime.now())
        return (output or outputs.DEFAULT_FOLDER) / name
    outputs.check_suffix(output)
    return output


def check(path: Path, *, compare: bool, force: bool) -> None:
    """Raise `VgenError` when writing would take something away."""
    from vgen.pipelines.edit import SIDE_BY_SIDE

    outputs.check(path, force=force, begins=True)
    if compare and not force:
        outputs.refuse_existing(path.with_name(f"{path.name}{SIDE_BY_SIDE}"))


def show_plan(plan: EditPlan, path: Path, form: Format) -> None:
    """Print what a run would make, without making it."""
    facts = {
        "clip": f"{len(plan.clip.frames)} frames of {plan.fit.size[0]}x{plan.fit.size[1]}",
        "windows": len(plan.windows),
        **plan.to_dict(),
        "chosen": plan.shown.settings.to_dict(),
    }
    if form is Format.json:
        print(json.dumps({"dry_run": True, "output": str(path), **facts, "notes": list(plan.notes)}))
        return
    print(path)
    results.show_facts(facts, "  ")


def show_report(report: Report, seed: int, form: Format) -> None:
    """Print what was made, what was measured, and what it cost."""
    made = [*(job.output for job in report.made), *report.beside]
    (measures,) = report.measures
    if form is Format.json:
        facts = {
            "outputs": [str(path) for path in made],
            "seed": seed,
            "latents": [str(path) for path in report.latents],
            "measures": measures,
            "attention": report.attention,
            "timings": {stage: round(seconds, 3) for stage, seconds in report.timings.items()},
            "peak_memory_mb": round(report.peak_memory_mb, 1),
            "peak_vram_mb": round(report.peak_vram_mb, 1),
            "warnings": report.warnings,
        }
        print(json.dumps(facts))
        return
    for path in (*made, *report.latents):
        print(path)
    results.show_facts(measures)
    for did in report.attention:
        say(results.attention_note(did))
    print(results.breakdown(report))
