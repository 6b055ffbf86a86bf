"""`vgen bench`: what a method is worth on this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vgen import quantization, runtime
from vgen.cli import flags
from vgen.cli.progress import say
from vgen.cli.results import Format
from vgen.errors import UsageError
from vgen.pipelines.bench.attention import MODELS, Shape, bench_attention, bench_block
from vgen.pipelines.bench.quantize import TOKENS, bench_quantize

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Measure on this machine what a method is worth, side by side."
)

EPILOG = """
[bold]Examples[/bold]

vgen bench attention --tokens 8192 --heads 12 --head-dim 128 --density 0.2

vgen bench attention --random-weights wan2.1-1.3b --attention tile:global=3

vgen bench quantize --scheme w8a8
"""


@app.callback()
def _root() -> None:
    pass


@app.command(epilog=EPILOG)
def attention(
    context: typer.Context,
    tokens: Annotated[int, typer.Option(min=1, help="The length of the sequence.")] = 8192,
    heads: Annotated[int, typer.Option(min=1, help="Of attention.")] = 12,
    head_dim: Annotated[int, typer.Option(min=1, help="Numbers per head.")] = 128,
    density: Annotated[float, typer.Option(help="The share of the blocks that are kept.")] = 0.2,
    kernel: Annotated[str, typer.Option(help="vgen attention list tells which.", metavar="NAME")] = "auto",
    block: Annotated[int, typer.Option(help="Tokens in a block.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="How often; the median counts.")] = 5,
    random_weights: Annotated[
        str | None,
        typer.Option(help=f"Instead: one block of a model at 480p and 81 frames: {', '.join(MODELS)}."),
    ] = None,
    pattern: Annotated[str | None, typer.Option("--attention", help="For --random-weights.", metavar="NAME")] = None,
    device: Annotated[str, typer.Option(help=flags.DEVICE)] = "auto",
    dtype: Annotated[str, typer.Option(help=flags.DTYPE)] = "auto",
    form: flags.Form = Format.text,
) -> None:
    """Time dense attention and a sparse kernel in turn, and tell how near it is to the ideal."""
    chosen = runtime.choose(device, dtype)
    if random_weights is not None:
        _refuse_given(context, ("tokens", "heads", "head_dim", "density", "kernel", "block"))
        found = bench_block(random_weights, pattern or "adaspa", repeats=repeats, chosen=chosen)
    elif pattern is not None:
        raise UsageError("--attention is for --random-weights.", tip="use --kernel and --density.")
    else:
        shape = Shape(tokens=tokens, heads=heads, head_dim=head_dim)
        found = bench_attention(shape, density, kernel=kernel, block=block, repeats=repeats, chosen=chosen)
    if form is Format.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


def _refuse_given(context: typer.Context, names: tuple[str, ...]) -> None:
    """Raise `UsageError` for options of a random mask, where a model's shapes and a pattern are measured."""
    sources = {f"--{name.replace('_', '-')}": context.get_parameter_source(name) for name in names}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        listed = ", ".join(given[:-1]) + " and " + given[-1] if len(given) > 1 else given[0]
        raise UsageError(
            f"{listed} {'have' if len(given) > 1 else 'has'} no effect with --random-weights.",
            tip="the model has the shapes, and --attention takes the rest: --attention adaspa:sparsity=0.8,block=128.",
        )


@app.command(epilog=EPILOG)
def quantize(
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            "--scheme", "-s", help="Repeat it for several. [dim]Default: all but w4a8-mp[/dim]", metavar="NAME"
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Repeat it for several. [dim]Default: 1024 and 8192[/dim]")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Turns; the median counts.")] = 5,
    model: Annotated[
        str, typer.Option(help="Whose video is denoised, too, at its defaults; none for linear layers alone.")
    ] = "toyland",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks of --model, in bfloat16, too.")
    ] = False,
    form: flags.Form = Format.text,
) -> None:
    """Time linear layers of Wan 2.1 1.3B's shapes, and a whole run, in bfloat16 and in schemes, in turns."""
    found = bench_quantize(
        schemes=scheme or [name for name in quantization.SCHEMES if name != "w4a8-mp"],
        tokens=tokens or TOKENS,
        repeats=repeats,
        model=None if model == "none" else model,
        device=device,
        compiled=compiled,
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
        run = found["run"]
        how = ", compiled" if run["compiled"] else ""
        _show(f"denoising a video, {run['model']}, {run['steps']} steps{how}", run, {}, found)


def _show(what: str, row: dict[str, Any], shares: dict[str, float], found: dict[str, Any]) -> None:
    print(what)
    for name, seconds in row["seconds"].items():
        share = f"  {shares[name]:.3f} x bytes" if name in shares else ""
        simulated = "  (simulated)" if found["arithmetic"].get(name) == "simulated" else ""
        print(f"  {name:12}{1000 * seconds:12.2f} ms{row['speedup'][name]:8.2f} x{share}{simulated}")
