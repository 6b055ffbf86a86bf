"""`vgen attention`: methods of sparse attention, pictures of what they keep, and plans for them."""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from vgen import attention, options, outputs
from vgen.attention import kernels
from vgen.checkpoints import resolve
from vgen.cli import flags, progress
from vgen.cli.progress import say
from vgen.cli.results import Format
from vgen.errors import UsageError
from vgen.plan import plan
from vgen.request import GenerateRequest

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Sparse attention: methods, pictures, plans.")

EPILOG = """
[bold]Examples[/bold]

vgen attention list

vgen attention show "a red ball bounces" --frames 65 -o outputs/maps

vgen attention search --model toyland --frames 65 --threshold 0.05 -o plan.json

vgen generate "a red ball bounces" --frames 65 --attention tile:plan=plan.json
"""

Seed = Annotated[int | None, typer.Option(help="The first prompt's; the next has the next. [dim]Default: 0[/dim]")]


@app.command(name="list", epilog=EPILOG)
def list_(form: flags.Form = Format.text) -> None:
    """List methods with their options and defaults, and kernels with where they run."""
    methods = {name: options.defaults(kind) for name, kind in attention.PATTERNS.items()}
    if form is Format.json:
        known = {
            name: {"blocks": k.blocks, "devices": k.devices, "about": k.about} for name, k in kernels.KERNELS.items()
        }
        print(json.dumps({"methods": methods, "kernels": known}))
        return
    print("Methods, for --attention NAME or NAME:option=value,option=value\n")
    for name, defaults in methods.items():
        print(name)
        said = (inspect.getdoc(attention.PATTERNS[name]) or "").replace("`", "")
        print(textwrap.indent(said, "  "))
        for option, value in defaults.items():
            print(f"    {option}={str(value).lower() if isinstance(value, bool) else value}")
        print()
    print("block is how many tokens are in a block, kernel what runs it.\n")
    print("Kernels (kernel=NAME; auto is triton on a CUDA GPU, cpu on a CPU)")
    for name, kernel in kernels.KERNELS.items():
        where = " and ".join(kernel.devices) or "any device"
        blocks = f", blocks of {', '.join(map(str, kernel.blocks))}" if kernel.blocks else ""
        print(f"  {name:10} {kernel.about} ({where}{blocks})")


@app.command()
def show(
    prompt: Annotated[str, typer.Argument(help="What the video shows, in quotes.")],
    model: flags.Model = "toyland",
    layers: Annotated[str | None, typer.Option(help="From 0: 0,3,7. Default: first, middle, last.")] = None,
    heads: Annotated[str | None, typer.Option(help="From 0: 0,1. Default: the first four.")] = None,
    at_steps: Annotated[str | None, typer.Option(help="From 0. Default: the middle one.", metavar="STEPS")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--attention", help="A method with its options; repeat it. Default: all.", metavar="NAME"),
    ] = None,
    seed: Seed = None,
    steps: flags.Steps = None,
    frames: flags.Frames = None,
    width: flags.Width = None,
    height: flags.Height = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder for the PNGs.")] = Path("outputs/attention"),
    force: flags.Force = False,
    form: flags.Form = Format.text,
) -> None:
    """Draw where attention lies in a run, and what each method would keep of it."""
    from vgen.pipelines import attention_maps

    outputs.check_folder(output)
    wanted: dict[str, Any] = {"methods": tuple(method)} if method else {}
    wanted |= {"heads": _numbers(heads, "--heads")} if heads else {}
    wanted |= {"layers": _numbers(layers, "--layers")} if layers else {}
    wanted |= {"steps": _numbers(at_steps, "--at-steps")} if at_steps else {}
    for name in method or ():
        attention.parse(name)
    if not force and not (output.is_dir() and not any(output.iterdir())):
        outputs.refuse_existing(output)
    given = _given(prompt, model, seed, steps, frames, width, height, device, dtype)
    made = plan(given, resolve(model))
    outputs.prepare_folder(output / "masks.json")
    for old in output.glob("layer-*.png"):
        old.unlink()
    with progress.shown(1) as watch:
        found = attention_maps.show(made, attention_maps.Wanted(**wanted), output, watch=watch)
    if form is Format.json:
        print(json.dumps({"folder": str(output), "masks": found}))
        return
    for name in dict.fromkeys(one["method"] for one in found):
        masks = [one for one in found if one["method"] == name]
        sparsity, recall = (sum(one[what] for one in masks) / len(masks) for what in ("sparsity", "recall"))
        say(f"{name}: leaves out {sparsity:.0%} of the pairs and keeps {recall:.0%} of the attention (recall).")
    for name in dict.fromkeys(one["picture"] for one in found):
        print(output / name)


@app.command()
def search(
    model: flags.Model = "toyland",
    threshold: Annotated[
        float, typer.Option(help="Most error of a layer, as a share of the power of what it puts out.")
    ] = 0.05,
    prompt: Annotated[list[str] | None, typer.Option(help="What to search on; repeat it.")] = None,
    seed: Seed = None,
    steps: flags.Steps = None,
    frames: flags.Frames = None,
    width: flags.Width = None,
    height: flags.Height = None,
    block: Annotated[int, typer.Option(help="Tokens in a block.")] = 64,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan to write.")] = Path("outputs/tile.json"),
    force: flags.Force = False,
    form: flags.Form = Format.text,
) -> None:
    """Search for each layer how few frames it needs to see, for tile:plan=FILE."""
    from vgen.pipelines import tile_search

    if output.is_dir():
        raise UsageError(f"{output} is a folder, and a plan is a file.", tip=f"use -o {output / 'tile.json'}.")
    if not force:
        outputs.refuse_existing(output)
    prompts = prompt or ["a red ball bounces on the grass", "a blue cube moves left at night"]
    checkpoint = resolve(model)
    base = 0 if seed is None else seed
    plans = [
        plan(_given(text, model, base + i, steps, frames, width, height, device, dtype), checkpoint)
        for i, text in enumerate(prompts)
    ]
    outputs.prepare_folder(output)
    with progress.shown(1) as watch:
        found = tile_search.search(plans, threshold, output, block=block, watch=watch)
    if form is Format.json:
        print(json.dumps(found))
        return
    for layer in found["layers"]:
        said = "dense" if layer["global"] is None else f"global={layer['global']}  error {layer['error']}"
        print(f"layer {layer['layer']:3}  {said}")
    say(f"In all, {found['sparsity']:.1%} of the pairs of tokens are left out.")
    print(output)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
        if min(numbers) < 0:
            raise ValueError("counted from 0")
        return numbers
    except ValueError as error:
        raise UsageError(
            f'Cannot read {option} "{text}".', tip=f"write numbers from 0 on, with commas: {option} 0,2."
        ) from error


def _given(prompt: str, model: str, seed: int | None, steps: int | None, frames: int | None, width: int | None,
           height: int | None, device: str | None, dtype: str | None) -> GenerateRequest:  # fmt: skip
    fields: dict[str, Any] = {"prompt": prompt, "model": model, "seed": 0 if seed is None else seed}
    fields |= {"num_inference_steps": steps, "num_frames": frames, "width": width, "height": height}
    fields |= {"device": device, "dtype": dtype}
    return GenerateRequest.from_dict({name: value for name, value in fields.items() if value is not None})
