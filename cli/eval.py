"""`vgen eval`: how well a model follows prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vgen import outputs
from vgen.cli import progress
from vgen.cli.results import Format
from vgen.pipelines import evaluate

app = typer.Typer(add_completion=False)

EPILOG = """
[bold]Examples[/bold]

vgen eval --prompts 20 [dim]a first impression[/dim]

vgen eval --model my-toyland --prompts 130 -o outputs/my-score --format json

[dim]A run that was stopped goes on: the same command makes only the videos that are not there yet.[/dim]
"""
COLUMNS = ("scene", "colour", "shape", "size", "action", "camera", "joint", "flicker")


@app.command(name="eval", epilog=EPILOG)
def eval_(
    model: Annotated[
        str, typer.Option(help="A name that vgen knows, a folder in diffusers layout, or a hub id.")
    ] = "toyland",
    prompts: Annotated[int, typer.Option("--prompts", "-n", help="How many held-out prompts, from 2 to 260.")] = 26,
    seed: Annotated[int, typer.Option(min=0, help="The first prompt's; the next has the next.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How strictly to follow the prompt.")] = None,
    sampler: Annotated[str | None, typer.Option(help="euler, heun or dpm++.", metavar="NAME")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder for videos, report and sheet.")] = Path(
        "outputs/eval"
    ),
    form: Annotated[Format, typer.Option("--format", help="For people or for programs.")] = Format.text,
) -> None:
    """Generate Toyland's held-out prompts, read the videos with probes, and print the score."""
    given: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "sampler": sampler,
        "device": device,
        "dtype": dtype,
    }
    given = {name: value for name, value in given.items() if value is not None}
    found = evaluate.trials(output, num_prompts=prompts, seed=seed, model=model, given=given)
    jobs = evaluate.missing(found)
    outputs.prepare_folder(output / evaluate.REPORT)
    with progress.shown(len(jobs)) as watch:
        report = evaluate.evaluate(output, found, jobs, watch=watch)
    if form is Format.json:
        print(json.dumps(report))
        return
    print(f"{'':9}" + "".join(f"{name:>9}" for name in COLUMNS))
    for name, row in (("model", report), ("ceiling", report["ceiling"]), ("floor", report["floor"])):
        shown = (f"{row[column]:9.4f}" if column in row else f"{'':9}" for column in COLUMNS)
        print(f"{name:9}" + "".join(shown).rstrip())
    print(report["report"])
    print(report["sheet"])
