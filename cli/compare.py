"""`vgen compare`: what a faster way of making a video saves, and what it changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vgen import outputs
from vgen.checkpoints import resolve
from vgen.cli import flags, progress
from vgen.cli.progress import say
from vgen.cli.results import Format
from vgen.errors import UsageError, VgenError
from vgen.pipelines import compare as comparison
from vgen.plan import plan
from vgen.request import GenerateRequest

app = typer.Typer(add_completion=False)

EPILOG = """
[bold]Examples[/bold]

vgen compare "a red ball bounces" --frames 65 --attention adaspa:sparsity=0.8

vgen compare "a red ball bounces" --frames 65 --attention tile:global=2 --against radial

vgen compare "a red ball bounces" --cache first-block
"""


@app.command(epilog=EPILOG)
def compare(
    prompt: Annotated[str, typer.Argument(help="What the video shows, in quotes.")],
    attention: Annotated[
        str, typer.Option(help="The attention to judge: adaspa:sparsity=0.8, ...", metavar="NAME")
    ] = "dense",
    cache: Annotated[str | None, typer.Option(help="The cache to judge.", metavar="NAME")] = None,
    against: Annotated[str, typer.Option(help="The attention to compare with.", metavar="NAME")] = "dense",
    negative: Annotated[str | None, typer.Option(help="What it does not show.")] = None,
    model: flags.Model = "toyland",
    seed: Annotated[int, typer.Option(help="Of both videos.")] = 0,
    steps: flags.Steps = None,
    guidance_scale: flags.GuidanceScale = None,
    sampler: flags.Sampler = None,
    width: flags.Width = None,
    height: flags.Height = None,
    frames: flags.Frames = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder for the video and the report.")] = Path(
        "outputs/compare"
    ),
    force: flags.Force = False,
    form: flags.Form = Format.text,
) -> None:
    """Make one video twice from one seed, and print speed, likeness and what was left out."""
    given: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative,
        "model": model,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "sampler": sampler,
        "width": width,
        "height": height,
        "num_frames": frames,
        "device": device,
        "dtype": dtype,
    }
    given = {name: value for name, value in given.items() if value is not None}
    outputs.check_folder(output)
    checkpoint = resolve(model)
    if not cache and attention == against:
        raise UsageError("Both videos are made in one way.", tip="give --attention adaspa, or a --cache.")
    ways = ({"attention": attention} | ({"cache": cache} if cache else {}), {"attention": against})
    fast, plain = (plan(GenerateRequest.from_dict({**given, **way}), checkpoint) for way in ways)
    if (output / comparison.REPORT).exists() and not force:
        raise VgenError(f"{output} has a comparison already.", tip="choose another --output, or pass --force.")
    outputs.prepare_folder(output / comparison.REPORT)
    with progress.shown(1) as watch:
        report = comparison.compare(fast, plain, output, watch=watch)
    if form is Format.json:
        print(json.dumps(report))
        return
    for name in ("fast", "plain"):
        run = report[name]
        recall = "" if run["recall"] is None else f"  recall {run['recall']:.3f}"
        cached = f", cache {run['cache']}" if run["cache"] else ""
        print(
            f"{run['attention']} ({run['kernel']}){cached}: denoise {run['denoise_s']:.2f} s, attention "
            f"alone {run['attention_s']:.2f} s, left out {run['sparsity']:.1%} of the pairs{recall}"
        )
    for layer in report["fast"]["layers"]:
        recall = "" if layer["recall"] is None else f"  recall {layer['recall']:.3f}"
        print(f"  layer {layer['layer']:3}  left out {layer['sparsity']:.1%}{recall}")
    speedup = report["speedup"]
    print(f"speed: denoise {speedup['denoise']:.2f} times, attention alone {speedup['attention']:.2f} times")
    print(f"likeness: PSNR {report['psnr']:.2f} dB, SSIM {report['ssim']:.4f}")
    if report["fast"]["recall"] is not None:
        say("Recall is the share of the attention that the masks kept, where they were in use.")
    say("Left in the video is the first, right the second.")
    print(report["video"])
