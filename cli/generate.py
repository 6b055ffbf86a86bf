"""`vgen generate`: videos from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vgen import batch, manifest, outputs
from vgen.batch import PromptLine
from vgen.cli import flags, progress, results
from vgen.cli.progress import say
from vgen.cli.results import Format
from vgen.errors import UsageError
from vgen.manifest import Manifest
from vgen.pipelines import ranks, run
from vgen.request import GenerateRequest

app = typer.Typer(add_completion=False)

EPILOG = """
[bold]Examples[/bold]

vgen generate "a red ball bounces on the grass"

vgen generate "a blue cube moves left" --seed 1 --seed 2 -o cube.mp4 [dim]# cube-1.mp4 and cube-2.mp4[/dim]

vgen generate "it jumps" --image first.png --seconds 4 -o jump.gif

vgen generate "it jumps" --video clip.mp4 --extend 3 [dim]# the clip, and how it goes on[/dim]

vgen generate "a ball rolls" --interpolate a.png@0 --interpolate b.png@8 --interpolate c.png@16

vgen generate "a fox" --model wan2.1-1.3b --lora style.safetensors:0.8

vgen generate "snow" --video clip.mp4 --mask hole.png [dim]# anew where the mask is white[/dim]

vgen generate --prompts prompts.txt -o clips/ [dim]# one video per line[/dim]

vgen generate --from clip.mp4 [dim]# the same frames again[/dim]

vgen generate --from clip.mp4 --steps 50 --dry-run [dim]# the plan, with one thing changed[/dim]
"""

WHAT, GIVEN, HOW, SIZE = "What to show", "What is given of it", "How to make it", "Size and length"


@app.command(epilog=EPILOG)
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows, in quotes.", show_default=False)] = None,
    negative: Annotated[
        str | None, typer.Option(help="What it does not show.", rich_help_panel=WHAT, show_default=False)
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture to begin with: the first frame.", rich_help_panel=WHAT)
    ] = None,
    last_image: Annotated[
        Path | None, typer.Option(help="A picture to end with, where the model can.", rich_help_panel=WHAT)
    ] = None,
    interpolate: Annotated[
        list[str] | None,
        typer.Option(
            help="A picture at a frame, counted from 0; repeat it for several.",
            rich_help_panel=GIVEN,
            metavar="IMAGE@FRAME",
        ),
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(
            help="A clip, or a folder of PNGs, to go on from or to complete; its sound is left out.",
            rich_help_panel=GIVEN,
        ),
    ] = None,
    extend: Annotated[
        float | None,
        typer.Option(
            help="Go on where --video ends, for so long; --frames is how many frames are made at once.",
            rich_help_panel=GIVEN,
            metavar="SECONDS",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="A picture that is white where --video is to be made anew.", rich_help_panel=GIVEN),
    ] = None,
    missing: Annotated[
        str | None,
        typer.Option(
            help="Frames of --video, at --fps, to make anew, counted from 0: 5-12,20.",
            rich_help_panel=GIVEN,
            metavar="FRAMES",
        ),
    ] = None,
    known_frames: Annotated[
        str | None,
        typer.Option(
            help="How the model is told what is given: timesteps, for models with one per token, or reinject, for "
            "any. [dim]Default: timesteps[/dim]",
            rich_help_panel=GIVEN,
            metavar="HOW",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file of prompts, one per line, or JSON objects such as "
            '{"prompt": "a red ball", "seed": 7, "frames": 33}. A broken line is reported and the others still run.',
            rich_help_panel=WHAT,
            metavar="FILE",
        ),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="A video that vgen made, or its .json: run it again. Other options change what they name.",
            rich_help_panel=WHAT,
            metavar="FILE",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help=f"{flags.MODEL} [dim]Default: toyland[/dim]", rich_help_panel=HOW, metavar="NAME|FOLDER|ID"),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help=flags.LORA, rich_help_panel=HOW, metavar="LORA[:SCALE]")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            help="The same seed gives the same video. Repeat it for several videos. [dim]Default: random[/dim]",
            rich_help_panel=HOW,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help=flags.STEPS, rich_help_panel=HOW)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help=flags.GUIDANCE_SCALE, rich_help_panel=HOW)] = None,
    guidance_scale_2: Annotated[float | None, typer.Option(help=flags.GUIDANCE_SCALE_2, rich_help_panel=HOW)] = None,
    true_cfg_scale: Annotated[
        float | None,
        typer.Option(
            help="Guidance by the negative prompt, where the model takes --guidance-scale as an input (HunyuanVideo).",
            rich_help_panel=HOW,
        ),
    ] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(help=flags.GUIDANCE_INTERVAL, rich_help_panel=HOW, metavar="LOW-HIGH")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help=flags.SAMPLER, rich_help_panel=HOW, metavar="NAME")] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Leave out most of self-attention: adaspa:sparsity=0.8, tile:global=2, ... vgen attention list tells "
            "all.",
            rich_help_panel=HOW,
            metavar="NAME",
        ),
    ] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", rich_help_panel=SIZE)] = None,
    height: Annotated[int | None, typer.Option(help="In pixels.", rich_help_panel=SIZE)] = None,
    frames: Annotated[int | None, typer.Option(help=flags.FRAMES, rich_help_panel=SIZE)] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Instead of --frames: rounded to a legal number of frames.", rich_help_panel=SIZE),
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second.", rich_help_panel=SIZE)] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Reuse what earlier steps computed, which is faster and changes the video: first-block, taylorseer "
            "or magcache; options as in first-block:threshold=0.1.",
            rich_help_panel=HOW,
            metavar="NAME",
        ),
    ] = None,
    performance: flags.Performance = None,
    offload: flags.Offload = None,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help=flags.COMPILE, rich_help_panel=flags.MACHINE, show_default=False),
    ] = None,
    device: flags.PanelDevice = None,
    dtype: flags.PanelDtype = None,
    gpus: flags.Gpus = None,
    context_parallel: flags.ContextParallel = None,
    output: flags.Output = None,
    force: flags.PanelForce = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="With --prompts: leave out videos that exist, and go on.", rich_help_panel=flags.OUTPUT
        ),
    ] = False,
    keep_latents: flags.KeepLatents = False,
    dry_run: flags.DryRun = False,
    form: flags.PanelForm = Format.text,
) -> None:
    """Make a video from a prompt."""
    given: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative,
        "model": model,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "guidance_scale_2": guidance_scale_2,
        "true_cfg_scale": true_cfg_scale,
        "guidance_interval": guidance_interval,
        "width": width,
        "height": height,
        "num_frames": frames,
        "seconds": seconds,
        "fps": fps,
        "sampler": sampler,
        "lora": lora or None,
        "image": image,
        "last_image": last_image,
        "interpolate": interpolate or None,
        "video": video,
        "extend": extend,
        "mask": mask,
        "missing": missing,
        "known_frames": known_frames,
        "cache": cache,
        "performance": performance,
        "offload": offload,
        "compile": compiled,
        "attention": attention,
        "device": device,
        "dtype": dtype,
        "gpus": gpus,
        "context_parallel": context_parallel,
    }
    lines, made_by = _requests(
        {name: value for name, value in given.items() if value is not None}, prompts, from_, seed
    )
    if resume and (prompts is None or output is None or outputs.is_folder(output)):
        raise UsageError(
            "--resume finds videos by their names, and default names hold the time.",
            tip="use it with --prompts FILE and -o clips/clip.mp4: line 1 becomes clips/clip-1.mp4, and so on.",
        )
    planned, failures = batch.plan_lines(lines, seed or [])
    jobs = run.jobs(planned, output)
    if resume:
        jobs = [job for job in jobs if not job.output.exists()]
    notes = [note for job in jobs for note in job.plan.notes]
    if made_by is not None:
        notes += [f"Warning: {found}" for found in manifest.differences(made_by, jobs[0].plan.checkpoint)]
    for note in dict.fromkeys(notes):
        say(note)
    for job in jobs:
        outputs.check(job.output, force=force, begins=not resume)
    num_gpus = ranks.num_gpus(jobs)
    if dry_run:
        results.show_plans(jobs, failures, form)
    else:
        for job in jobs:
            outputs.prepare_folder(job.output)
        if num_gpus > 1:
            with progress.restored():
                report = ranks.generate(jobs, shown=progress.shown, keep_latents=keep_latents)
        else:
            with progress.shown(len(jobs)) as watch:
                report = run.generate(jobs, watch=watch, keep_latents=keep_latents, keep_going=prompts is not None)
        failures = report.failures = [*failures, *report.failures]
        results.show_report(report, form)
    if failures:
        raise typer.Exit(1)


def _requests(
    fields: dict[str, Any], prompts: Path | None, from_: Path | None, seeds: list[int] | None
) -> tuple[list[PromptLine], Manifest | None]:
    """Return what is asked for, and the manifest that it is asked for by."""
    if prompts is not None:
        if from_ is not None or "prompt" in fields:
            raise UsageError("--prompts takes the place of a prompt and of --from.", tip="give one of them.")
        return batch.read(prompts, fields), None
    if from_ is not None:
        made_by = manifest.read(from_)
        if made_by.get("task") == "edit":
            raise UsageError(f"{from_} was made by vgen edit.", tip=f"run it again with: vgen edit --from {from_}")
        # A seed that is given counts, not the one that made the video.
        changes = {**fields, "seed": None} if seeds else fields
        return [PromptLine(number=None, request=manifest.request(made_by, changes))], made_by
    if "prompt" not in fields:
        raise UsageError("There is no prompt.", tip='try: vgen generate "a red ball bounces on the grass".')
    return [PromptLine(number=None, request=GenerateRequest.from_dict(fields))], None
