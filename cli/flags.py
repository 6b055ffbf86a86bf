"""Options that several commands have, each worded once; small commands have no panels, the large ones share two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vgen.cli.results import Format

# What options say that stand in other panels, or have another type, from command to command.
MODEL = "A name that vgen knows, a folder in diffusers layout, or a hub id."
LORA = (
    "A LoRA in safetensors (a file, a folder or a hub id, OWNER/NAME/FILE) and its strength, 1 if not given; repeat "
    "it for their sum. high=..., low=... or both=... says which of two transformers."
)
STEPS = "Denoising steps: more is slower and finer."
GUIDANCE_SCALE = "How strictly to follow the prompt; 1 is no guidance, half the work."
GUIDANCE_SCALE_2 = "The same for the second of two transformers (Wan 2.2), where it differs."
GUIDANCE_INTERVAL = "Noise levels at which there is guidance, of 0 to 1: others take half the work. 0-1 is everywhere."
SAMPLER = "euler, heun, dpm++, rf-solver, fireflow, lcm or native; options as in name:key=value."
FRAMES = "How many frames, such as 17 or 33."
COMPILE = "Compile the transformer's blocks: the first step waits, the others are faster."
DEVICE = "cpu, cuda, cuda:1 or mps."
DTYPE = "float32, bfloat16 or float16."
BEST_DEVICE, BEST_DTYPE = f"{DEVICE} [dim]Default: the best[/dim]", f"{DTYPE} [dim]Default: the fastest[/dim]"
FORCE, FORM = "Replace files that exist.", "For people or for programs."

# Of commands without panels.
Model = Annotated[str, typer.Option(help=MODEL, metavar="NAME|FOLDER|ID")]
Steps = Annotated[int | None, typer.Option(help=STEPS)]
GuidanceScale = Annotated[float | None, typer.Option(help=GUIDANCE_SCALE)]
GuidanceInterval = Annotated[str | None, typer.Option(help=GUIDANCE_INTERVAL, metavar="LOW-HIGH")]
Sampler = Annotated[str | None, typer.Option(help=SAMPLER, metavar="NAME")]
Width = Annotated[int | None, typer.Option(help="In pixels.")]
Height = Annotated[int | None, typer.Option(help="In pixels.")]
Frames = Annotated[int | None, typer.Option(help=FRAMES)]
Device = Annotated[str | None, typer.Option(help=BEST_DEVICE)]
Dtype = Annotated[str | None, typer.Option(help=BEST_DTYPE)]
Force = Annotated[bool, typer.Option("--force", help=FORCE)]
Form = Annotated[Format, typer.Option("--format", help=FORM)]

# In the panels that generate, edit and invert share.
MACHINE, OUTPUT = "Machine", "Output"

Performance = Annotated[
    str | None,
    typer.Option(
        help="auto, speed or memory: what is offloaded, tiled and compiled, by what the model needs and what is free; "
        "--dry-run tells. [dim]Default: auto[/dim]",
        rich_help_panel=MACHINE,
        metavar="WHAT",
    ),
]
Offload = Annotated[
    str | None,
    typer.Option(
        help="What is on the GPU at a time: everything (none), one model, or one block of it (group). "
        "[dim]Default: auto[/dim]",
        rich_help_panel=MACHINE,
        metavar="none|model|group|auto",
    ),
]
PanelDevice = Annotated[str | None, typer.Option(help=BEST_DEVICE, rich_help_panel=MACHINE)]
PanelDtype = Annotated[str | None, typer.Option(help=BEST_DTYPE, rich_help_panel=MACHINE)]
Gpus = Annotated[
    int | None,
    typer.Option(
        help="Share a video among so many GPUs; with --device cpu among processes, to try it out.",
        rich_help_panel=MACHINE,
    ),
]
ContextParallel = Annotated[
    str | None,
    typer.Option(
        help="How GPUs share a video: ulysses, ring, or both as unified:ulysses_degree=2. [dim]Default: ulysses[/dim]",
        rich_help_panel=MACHINE,
        metavar="NAME",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="A file ending in .mp4, .webm, .gif or .png (a folder of frames), or a folder for default names. "
        "[dim]Default: outputs/[/dim]",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
KeepLatents = Annotated[
    bool, typer.Option("--keep-latents", help="Keep them for vgen decode.", rich_help_panel=OUTPUT)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and make nothing.", rich_help_panel=OUTPUT)]
PanelForce = Annotated[bool, typer.Option("--force", help=FORCE, rich_help_panel=OUTPUT)]
PanelForm = Annotated[Format, typer.Option("--format", help=FORM, rich_help_panel=OUTPUT)]
