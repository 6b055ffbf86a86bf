"""`vgen edit`: a clip, changed as a prompt says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vgen import manifest, outputs
from vgen.cli import edits, flags, progress
from vgen.cli.progress import say
from vgen.cli.results import Format
from vgen.editing.plan import plan as planned
from vgen.errors import UsageError

app = typer.Typer(add_completion=False)

EPILOG = """
[bold]Examples[/bold]

vgen edit clip.mp4 --source "a red ball moves right on grass" --target "a blue cube moves right on grass" -o out.mp4

vgen edit clip.mov --target "a snowy night" --compare [dim]# and a video of both, side by side[/dim]

vgen edit clip.mp4 --source "..." --target "..." --inject 3 --mask mask.png

vgen invert clip.mp4 --source "..." -o noise.safetensors [dim]# once, then as many edits as wanted:[/dim]

vgen edit clip.mp4 --noise noise.safetensors --target "..." -o one.mp4

vgen edit --from out.mp4 --guidance-scale 5 [dim]# the same with one thing changed[/dim]
"""

WHAT, HOW = edits.WHAT, edits.HOW


@app.command(epilog=EPILOG)
def edit(
    clip: Annotated[Path | None, typer.Argument(help=edits.CLIP, show_default=False)] = None,
    target: Annotated[
        str | None, typer.Option(help="What the edited clip shows.", rich_help_panel=WHAT, show_default=False)
    ] = None,
    source: edits.Source = None,
    negative: Annotated[str | None, typer.Option(help="What it does not show.", rich_help_panel=WHAT)] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            help="Where to edit: auto, where the two prompts disagree; a picture or a video, white there; or none, "
            "everywhere. Elsewhere the clip stays as it is. [dim]Default: auto[/dim]",
            rich_help_panel=WHAT,
            metavar="auto|none|FILE",
        ),
    ] = None,
    border: Annotated[
        int | None,
        typer.Option(help="Pixels over which a mask fades out. [dim]Default: 8[/dim]", rich_help_panel=WHAT),
    ] = None,
    noise: Annotated[
        Path | None,
        typer.Option(help="What vgen invert wrote for this clip: the inversion is left out.", rich_help_panel=WHAT),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="A video that vgen edit made, or its .json: run it again. Other options change what they name.",
            rich_help_panel=WHAT,
            metavar="FILE",
        ),
    ] = None,
    model: edits.Model = None,
    lora: edits.Lora = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="euler, rf-solver, fireflow, flowedit or sdedit; options as in rf-solver:begin=0.5,share=time. "
            "[dim]Default: fireflow[/dim]",
            rich_help_panel=HOW,
            metavar="NAME",
        ),
    ] = None,
    steps: edits.Steps = None,
    strength: edits.Strength = None,
    inject: edits.Inject = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How strictly to follow the target.", rich_help_panel=HOW)
    ] = None,
    guidance_scale_2: Annotated[float | None, typer.Option(help=flags.GUIDANCE_SCALE_2, rich_help_panel=HOW)] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(help=flags.GUIDANCE_INTERVAL, rich_help_panel=HOW, metavar="LOW-HIGH")
    ] = None,
    true_cfg_scale: Annotated[
        float | None,
        typer.Option(
            help="The same by the negative prompt, where the model takes the other as an input.", hidden=True
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of flowedit's, sdedit's and an automatic mask's noise.", rich_help_panel=HOW),
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
    gpus: flags.Gpus = None,
    context_parallel: flags.ContextParallel = None,
    output: flags.Output = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="A video of the clip and its edit side by side.", rich_help_panel=flags.OUTPUT),
    ] = False,
    force: flags.PanelForce = False,
    keep_latents: flags.KeepLatents = False,
    dry_run: flags.DryRun = False,
    form: flags.PanelForm = Format.text,
) -> None:
    """Change a clip as a prompt says, and leave the rest of it as it is."""
    given: dict[str, Any] = {
        "video": clip,
        "target": target,
        "source": source,
        "negative_prompt": negative,
        "mask": mask,
        "border": border,
        "noise": noise,
        "model": model,
        "lora": lora or None,
        "method": method,
        "num_inference_steps": steps,
        "strength": strength,
        "inject": inject,
        "guidance_scale": guidance_scale,
        "guidance_scale_2": guidance_scale_2,
        "guidance_interval": guidance_interval,
        "true_cfg_scale": true_cfg_scale,
        "seed": seed,
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
        "gpus": gpus,
        "context_parallel": context_parallel,
    }
    request, made_by = edits.request({name: value for name, value in given.items() if value is not None}, from_)
    if request.target is None:
        raise UsageError("There is no target prompt.", tip='say what the edited clip shows: --target "a blue cube".')
    plan = planned(request)
    path = edits.output_path(output, plan)
    for note in plan.notes:
        say(note)
    if made_by is not None:
        for found in manifest.differences(made_by, plan.shown.checkpoint):
            say(f"Warning: {found}")
    edits.check(path, compare=compare, force=force)
    if dry_run:
        edits.show_plan(plan, path, form)
        return
    outputs.prepare_folder(path)
    from vgen.pipelines import edit as pipeline
    from vgen.pipelines import ranks, run

    job = pipeline.job(plan, path, compare=compare)
    if ranks.num_gpus([job]) > 1:
        with progress.restored():
            report = ranks.generate([job], shown=progress.shown, keep_latents=keep_latents)
    else:
        with progress.shown(1) as watch:
            report = run.generate([job], watch=watch, keep_latents=keep_latents)
    edits.show_report(report, plan.seed, form)
