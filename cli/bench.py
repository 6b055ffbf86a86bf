"""`vgen bench`: what a method is worth on this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vgen import quantization
from vgen.cli.progress import say
from vgen.cli.results import Format
from vgen.pipelines import bench

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Measure on this machine what a method is worth, side by side."
)


@app.callback()
def _root() -> None:
    pass


@app.command()
def quantize(
    scheme: Annotated[
        list[str] | None,
        typer.Option("--scheme", "-s", help="Repeat it for several. [dim]Default: all[/dim]", metavar="NAME"),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Repeat it for several. [dim]Default: 1024 and 8192[/dim]")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Turns; the median counts.")] = 5,
    model: Annotated[
        str, typer.Option(help="Whose video is denoised, too, at its defaults; none for linear layers alone.")
    ] = "toyland",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "auto",
    form: Annotated[Format, typer.Option("--format", help="For people or for programs.")] = Format.text,
) -> None:
    """Time linear layers of Wan 2.1 1.3B's shapes, and a whole run, in bfloat16 and in schemes, in turns."""
    found = bench.bench_quantize(
        schemes=scheme or [name for name in quantization.SCHEMES if name != "w4a8-mp"],
        tokens=tokens or bench.TOKENS,
        repeats=repeats,
        model=None if model == "none" else model,
        device=device,
        on_progress=say,
    )
    if form is Format.json:
        print(json.dumps(found))
        return
    machine = found["machine"]
    print(f"{machine['name']}, {machine['device']}, {machine['threads']} threads, torch {machine['torch']}")
    for row in found["linear"]:
        _show(f"{row['tokens']} tokens, {row['inputs']} -> {row['outputs']}", row, row["bytes_share"], found)
    if "run" in found:
        _show(f"denoising a video, {found['run']['model']}, {found['run']['steps']} steps", found["run"], {}, found)


def _show(what: str, row: dict[str, Any], shares: dict[str, float], found: dict[str, Any]) -> None:
    print(what)
    for name, seconds in row["seconds"].items():
        share = f"  {shares[name]:.3f} x bytes" if name in shares else ""
        simulated = "  (simulated)" if found["arithmetic"].get(name) == "simulated" else ""
        print(f"  {name:12}{1000 * seconds:12.2f} ms{row['speedup'][name]:8.2f} x{share}{simulated}")
