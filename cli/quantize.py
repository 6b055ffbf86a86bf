"""`vgen quantize`: a smaller model, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vgen import checkpoints, outputs, quantization
from vgen.cli import flags, progress
from vgen.cli.results import Format
from vgen.errors import CheckpointError
from vgen.hub import readable
from vgen.pipelines import quantize as pipeline
from vgen.quantization import plan as quantizing
from vgen.quantization.plan import QuantizePlan
from vgen.quantization.request import QuantizeRequest

app = typer.Typer(add_completion=False)

EPILOG = """
[bold]Schemes[/bold]

[bold]w8a8[/bold]: int8 weights and activations, [bold]w4a8[/bold]: int4 weights, int8 activations, balanced;
[bold]w4a8-mp[/bold]: the same with int8 weights where 4 bits lose most; [bold]w8a16[/bold] and [bold]w4a16[/bold]:
smaller weights alone.

[bold]Examples[/bold]

vgen quantize toyland --scheme w8a8 -o toyland-w8a8

vgen quantize toyland --scheme w4a8:group=64,alpha=0.5 -o toyland-w4a8 --max-loss score=2

vgen quantize wan2.1-1.3b --scheme w4a8-mp:bits=5 --calibration prompts.txt -o wan-w4a8 --dry-run

vgen quantize wan2.1-14b --scheme w4a8 --stream -o wan-14b-w4a8 [dim]# stopped? the same command goes on[/dim]

vgen generate "a red ball bounces on the grass" --model toyland-w8a8
"""


@app.command(epilog=EPILOG)
def quantize(
    model: Annotated[str, typer.Argument(help=flags.MODEL)],
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme",
            "-s",
            help=f"{', '.join(quantization.SCHEMES)}; options as in name:key=value.",
            metavar="NAME",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
    calibration: Annotated[
        Path | None,
        typer.Option(help="A file of prompts to calibrate with. [dim]Default: built-in ones[/dim]", metavar="FILE"),
    ] = None,
    samples: Annotated[int, typer.Option(help="How many videos to calibrate with.")] = 8,
    steps: Annotated[
        int | None,
        typer.Option(help="Denoising steps of each of them. [dim]Default: 10[/dim]", show_default=False),
    ] = None,
    compare: Annotated[
        int,
        typer.Option(
            help="How many videos to make before and after, with the same seeds, for the report; of toyland they are "
            "held-out prompts, and scored."
        ),
    ] = 4,
    max_loss: Annotated[
        str | None,
        typer.Option(
            help="Write nothing where more is lost: score=2 (points), psnr=30 (dB at least), ssim=0.9 (at least), or "
            "several with commas.",
            metavar="LIMITS",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="A LoRA to merge before, as of vgen generate; repeat it for several.", metavar="FILE|ID[:SCALE]"
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="A first frame to calibrate with, for models that need one.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first video's; the next has the next.")] = 0,
    device: Annotated[str, typer.Option(help=flags.DEVICE)] = "auto",
    dtype: Annotated[str, typer.Option(help=f"Of what is not quantized: {flags.DTYPE}")] = "auto",
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Leave the weights on the disk, one in memory at a time: slower. [dim]Default: where they do not fit "
            "into it[/dim]",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an export that is there, or what another run left unfinished.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, its sizes and its time, and do nothing.")
    ] = False,
    form: flags.Form = Format.text,
) -> None:
    """Quantize a model's weights and activations, write it as a folder that --model takes, and report what it cost."""
    asked = QuantizeRequest(
        model=model,
        scheme=scheme,
        output=output,
        calibration=calibration,
        samples=samples,
        steps=steps,
        compare=compare,
        lora=tuple(lora or ()) or None,
        image=image,
        max_loss=max_loss,
        seed=seed,
        device=device,
        dtype=dtype,
        stream=stream,
        force=force,
    )
    checkpoint = checkpoints.resolve(model)
    quantizing.check(asked, checkpoint)
    with progress.shown(1) as watch:
        if dry_run and checkpoint.repo is not None and not checkpoints.is_whole(checkpoint):
            raise CheckpointError(
                f'"{checkpoint.name}" was not downloaded: its layers are not known.',
                tip=f"get it first: vgen models pull {checkpoint.name}",
            )
        if not dry_run:
            checkpoint = checkpoints.fetch(checkpoint, watch.download)
        checkpoints.verify(checkpoint, full=False)
        plan = quantizing.plan(asked, checkpoint)
        if not dry_run:
            outputs.prepare_folder(output)
            report = pipeline.quantize(plan, watch=watch)
    if dry_run:
        _show_plan(plan, form)
    else:
        _show_report(output, report, form)


def _show_plan(plan: QuantizePlan, form: Format) -> None:
    sizes = plan.sizes
    facts: dict[str, Any] = {
        "dry_run": True,
        "output": str(plan.request.output),
        "model": plan.checkpoint.anchored_name,
        "scheme": plan.request.scheme,
        "layers": len(plan.layers),
        "kept": list(plan.kept),
        "streamed": plan.checkpoint.streamed,
        "bytes": sizes.to_dict(),
        "evaluations": plan.num_evaluations,
        "seconds_at_least": round(pipeline.least_seconds(plan), 1),
    }
    if form is Format.json:
        print(json.dumps(facts))
        return
    print(f"{plan.request.output}\n  scheme: {plan.request.scheme}, of {plan.checkpoint.anchored_name}")
    print(f"  quantized: {len(plan.layers)} linear layers, {_share(facts['bytes'])}")
    print(f"  kept as they are: {len(plan.kept)} linear layers, and all that is none")
    if plan.checkpoint.streamed:
        print("  memory: weights stay on the disk, one is read at a time")
    print(f"  weights on disk: {readable(sizes.after)}, before {readable(sizes.before)}")
    print(
        f"  work: {len(plan.calibration)} videos to calibrate, {len(plan.comparison)} to compare, made twice: "
        f"{plan.num_evaluations} evaluations of the model"
    )
    print(f"  time: more than {facts['seconds_at_least']:g} s, which their multiplications take on this device")


def _show_report(output: Path, report: dict[str, Any], form: Format) -> None:
    if form is Format.json:
        print(json.dumps({"output": str(output), "report": str(output / pipeline.REPORT), **report}))
        return
    print(output)
    print(f"quantized layers: {_share(report['bytes'])}, {report['bits_per_weight']:g} bits per weight")
    if (comparison := report["comparison"]) is not None:
        seconds = comparison["denoise_seconds"]
        print(
            f"against the original: PSNR {comparison['psnr']:g} dB, SSIM {comparison['ssim']:g}; denoising "
            f"{seconds['before']:.2f} s before, {seconds['after']:.2f} s after ({report['arithmetic']})"
        )
    if (score := report["score"]) is not None:
        before, after = score["before"]["joint"], score["after"]["joint"]
        print(f"joint score over {score['prompts']} prompts: {before:g} before, {after:g} after")
    print(output / pipeline.PAGE)


def _share(sizes: dict[str, Any]) -> str:
    after, before = readable(sizes["layers_after"]), readable(sizes["layers_before"])
    return f"{after} instead of {before} in bfloat16 ({sizes['layers_share']:g})"
