"""`vgen bench`: what the parts of a run cost on this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vgen import runtime
from vgen.cli.results import Format
from vgen.errors import UsageError
from vgen.pipelines import bench

app = typer.Typer(add_completion=False, no_args_is_help=True, help="What the parts of a run cost on this machine.")

EPILOG = """
[bold]Examples[/bold]

vgen bench attention --tokens 8192 --heads 12 --head-dim 128 --density 0.2

vgen bench attention --random-weights wan2.1-1.3b --attention tile:global=3
"""


@app.callback()
def _bench() -> None:
    pass


@app.command(epilog=EPILOG)
def attention(
    tokens: Annotated[int, typer.Option(min=1, help="The length of the sequence.")] = 8192,
    heads: Annotated[int, typer.Option(min=1)] = 12,
    head_dim: Annotated[int, typer.Option(min=1, help="Numbers per head.")] = 128,
    density: Annotated[float, typer.Option(help="The share of the blocks that are kept.")] = 0.2,
    kernel: Annotated[str, typer.Option(help="vgen attention list tells which.", metavar="NAME")] = "auto",
    block: Annotated[int, typer.Option(help="Tokens in a block.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="How often; the median counts.")] = 5,
    random_weights: Annotated[
        str | None,
        typer.Option(help=f"Instead: one block of a model at 480p and 81 frames: {', '.join(bench.MODELS)}."),
    ] = None,
    pattern: Annotated[str | None, typer.Option("--attention", help="For --random-weights.", metavar="NAME")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "auto",
    form: Annotated[Format, typer.Option("--format", help="For people or for programs.")] = Format.text,
) -> None:
    """Time dense attention and a sparse kernel in turn, and tell how near it is to the ideal."""
    chosen = runtime.choose(device, dtype)
    if random_weights is not None:
        found = bench.bench_block(random_weights, pattern or "adaspa", repeats=repeats, chosen=chosen)
    elif pattern is not None:
        raise UsageError("--attention is for --random-weights.", tip="use --kernel and --density.")
    else:
        shape = bench.Shape(tokens=tokens, heads=heads, head_dim=head_dim)
        found = bench.bench_attention(shape, density, kernel=kernel, block=block, repeats=repeats, chosen=chosen)
    if form is Format.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
