"""`vgen eval`: how well a model does a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vgen import outputs
from vgen.cli import flags, progress
from vgen.cli.results import Format
from vgen.errors import UsageError, did_you_mean
from vgen.pipelines.evaluate import REPORT, TASKS, evaluate, trials

app = typer.Typer(add_completion=False)

EPILOG = f"""
[bold]Tasks[/bold]

generate: [dim]videos from prompts[/dim]

known-frames: [dim]{", ".join(TASKS["known-frames"].parts)}[/dim]

edit: [dim]{", ".join(TASKS["edit"].parts)}[/dim]

[bold]Examples[/bold]

vgen eval --prompts 20 [dim]# a first impression[/dim]

vgen eval --model my-toyland --prompts 130 -o outputs/my-score --format json

vgen eval known-frames --prompts 4 --only image --only region

vgen eval edit --prompts 50 --only flowedit --only sdedit

[dim]A run that was stopped goes on: the same command makes only the videos that are not there yet.[/dim]
"""
OUTPUTS = {name: Path("outputs") / ("eval" if name == "generate" else f"eval-{name}") for name in TASKS}
WIDTH = 9  # of a column


@app.command(name="eval", epilog=EPILOG)
def eval_(
    task: Annotated[str, typer.Argument(metavar="TASK", help=f"{' or '.join(TASKS)}.")] = "generate",
    model: flags.Model = "toyland",
    prompts: Annotated[int, typer.Option("--prompts", "-n", help="How many held-out prompts, from 2 to 260.")] = 26,
    seed: Annotated[int, typer.Option(min=0, help="The first prompt's; the next has the next.")] = 0,
    steps: flags.Steps = None,
    guidance_scale: flags.GuidanceScale = None,
    guidance_interval: flags.GuidanceInterval = None,
    sampler: flags.Sampler = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PART", help="This part of the task alone. Repeatable.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A folder for videos, report and sheet. [dim]Default: outputs/eval\\[-TASK][/dim]",
        ),
    ] = None,
    form: flags.Form = Format.text,
) -> None:
    """Make the videos of Toyland's held-out prompts, read them with probes, and print the score."""
    if task not in TASKS:
        raise UsageError(f'There is no task "{task}".{did_you_mean(task, TASKS)}', tip=f"use {' or '.join(TASKS)}.")
    if only and not TASKS[task].parts:
        raise UsageError(f"The task {task} has no parts, and --only names one.", tip="leave out --only.")
    given: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "guidance_interval": guidance_interval,
        "sampler": sampler,
        "device": device,
        "dtype": dtype,
    }
    asked = trials.Evaluation(
        task=task,
        folder=output or OUTPUTS[task],
        num_prompts=prompts,
        seed=seed,
        model=model,
        given={name: value for name, value in given.items() if value is not None},
        only=tuple(only or ()),
    )
    outputs.check_folder(asked.folder)
    found = TASKS[task].trials(asked)
    jobs = trials.missing(found)
    outputs.prepare_folder(asked.folder / REPORT)
    with progress.shown(len(jobs)) as watch:
        report = evaluate(asked, found, jobs, watch=watch)
    if form is Format.json:
        print(json.dumps(report))
        return
    rows = TASKS[task].table(report)
    names = max(len(name) for name, _ in rows)
    print(" " * names + "".join(f"{column:>{WIDTH}}" for column in TASKS[task].columns))
    for name, row in rows:
        print(f"{name:{names}}" + "".join(cell(row, column) for column in TASKS[task].columns).rstrip())
    print(report["report"])
    print(report["sheet"])


def cell(row: dict[str, Any], column: str) -> str:
    """Return a value of a table's row as it is printed; a PSNR of no error at all is "exact"."""
    if column not in row:
        return " " * WIDTH
    if row[column] is None:
        return f"{'exact':>{WIDTH}}"
    return f"{row[column]:{WIDTH}.{2 if column.endswith('_db') else 4}f}"
