"""`vgen train`: the embedded model, from nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from vgen import checkpoints
from vgen.errors import UsageError
from vgen.files import not_written

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Train the embedded model. Runs stop at their budget, save as they go, and go on where they were stopped.",
)

EPILOG = """
[bold]From nothing to a checkpoint[/bold]

vgen train vae --minutes 25 -o runs/vae

vgen train text --steps 1500 -o runs/text

vgen train base --vae runs/vae/vae --text runs/text --clips 1x128x128=16000 --minutes 35 -o runs/images

vgen train base --vae runs/vae/vae --start runs/images --clips 17x128x128=5000 --minutes 65 -o runs/videos

vgen train export --vae runs/vae/vae --base runs/videos -o my-toyland

[dim]Several GPUs: accelerate launch -m vgen train base …[/dim]
"""

Minutes = Annotated[float | None, typer.Option(min=0.05, help="The budget in minutes of training, resumes included.")]
Steps = Annotated[int | None, typer.Option(min=1, help="The budget in steps instead; repeats bit for bit.")]
Seed = Annotated[int, typer.Option(min=0, help="Of weights, clips, captions and noise.")]
Decay = Annotated[
    float, typer.Option(min=0.01, max=1, help="The last share of the budget, over which the learning rate falls.")
]
SaveMinutes = Annotated[float, typer.Option(min=0.05, help="Minutes between two saves.")]


@app.callback()
def _train() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it names every file of every save


@app.command(epilog=EPILOG)
def vae(
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.")] = Path("runs/vae"),
    minutes: Minutes = None,
    steps: Steps = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Crops of five frames, 64×64, in a step.")] = 4,
    freeze_encoder: Annotated[
        bool, typer.Option(help="Train the decoder alone, so that what was trained on the latents stays right.")
    ] = False,
    start: Annotated[Path | None, typer.Option(help="A VAE's folder to begin from.")] = None,
    learning_rate: Annotated[float, typer.Option(min=1e-6, help="Of the kernels' Muon.")] = 1e-2,
    seed: Seed = 0,
    save_minutes: SaveMinutes = 5.0,
) -> None:
    """Train the VAE on crops of rendered clips."""
    require_budget(minutes, steps)
    if start:
        require_vae(start)
    make_folder(output)
    from vgen.training.loop import Budget
    from vgen.training.vae import train_vae

    train_vae(
        output,
        budget=Budget(minutes=minutes, steps=steps, save_minutes=save_minutes),
        batch_size=batch_size,
        freeze_encoder=freeze_encoder,
        start=start,
        learning_rate=learning_rate,
        seed=seed,
    )
    print(output / "vae")


@app.command(epilog=EPILOG)
def text(
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.")] = Path("runs/text"),
    minutes: Minutes = None,
    steps: Steps = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Captions in a step.")] = 256,
    learning_rate: Annotated[float, typer.Option(min=1e-6, help="Of AdamW.")] = 2e-3,
    seed: Seed = 0,
    save_minutes: SaveMinutes = 5.0,
) -> None:
    """Train the text encoder to know what captions say."""
    require_budget(minutes, steps)
    make_folder(output)
    from vgen.training.loop import Budget
    from vgen.training.text import train_text

    train_text(
        output,
        budget=Budget(minutes=minutes, steps=steps, save_minutes=save_minutes),
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    print(output)


@app.command(epilog=EPILOG)
def base(
    vae: Annotated[Path, typer.Option(help="The folder of a trained VAE.")],
    clips: Annotated[
        list[str], typer.Option(help="FRAMESxHEIGHTxWIDTH=COUNT: clips to render, encode and keep. Repeatable.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.")] = Path("runs/base"),
    text: Annotated[Path | None, typer.Option(help="The folder of a text run, to begin from.")] = None,
    start: Annotated[Path | None, typer.Option(help="Or another base run's folder, to take all weights from.")] = None,
    minutes: Minutes = None,
    steps: Steps = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips in a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=1e-6, help="Of the blocks' Muon.")] = 2e-3,
    compile: Annotated[bool, typer.Option(help="Compile the blocks: a minute's wait, then faster steps.")] = True,
    decay: Decay = 0.35,
    time_mean: Annotated[
        float, typer.Option(help="Noise of an image: the mean of logit(sigma); that of clips is higher.")
    ] = 0.8,
    time_spread: Annotated[float, typer.Option(min=0, help="The deviation of logit(sigma).")] = 1.4,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the weights of every save.")] = False,
    seed: Seed = 0,
    save_minutes: SaveMinutes = 5.0,
) -> None:
    """Train the DiT, and the text encoder with it, on latents of rendered clips."""
    require_budget(minutes, steps)
    shapes = [parse_clips(shape) for shape in clips]
    require_vae(vae)
    if (text is None) == (start is None):
        raise UsageError("A base run begins with --text or --start, one of them.", tip="for example --text runs/text.")
    if text:
        require_text(text)
    if start:
        require_run(start)
    make_folder(output)
    from vgen.training.base import train_base
    from vgen.training.loop import Budget

    train_base(
        output,
        vae=vae,
        shapes=shapes,
        text_encoder=text / "text_encoder" if text else None,
        start=start,
        budget=Budget(minutes=minutes, steps=steps, save_minutes=save_minutes, decay_share=decay),
        batch_size=batch_size,
        learning_rate=learning_rate,
        time_mean=time_mean,
        time_spread=time_spread,
        compile_blocks=compile,
        keep=keep,
        seed=seed,
    )
    print(output)


@app.command(epilog=EPILOG)
def probes(
    vae: Annotated[
        Path | None, typer.Option(help="The folder of a trained VAE. [dim]Default: the embedded checkpoint's[/dim]")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.")] = Path("runs/probes"),
    start: Annotated[Path | None, typer.Option(help="A folder of probes to begin from.")] = None,
    minutes: Minutes = None,
    steps: Steps = None,
    passed_clips: Annotated[
        int, typer.Option(min=2, help="Clips to pass through the VAE once, and keep: half a second each.")
    ] = 1024,
    passed_heads: Annotated[int, typer.Option(min=0, help="Clips of toy heads to pass through it as well.")] = 0,
    passed_turns: Annotated[
        int, typer.Option(min=0, help="Clips of solids that spin or stay to pass through it as well.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=2, help="Clips in a step, half of them fresh renders.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=1e-6, help="Of the kernels' Muon.")] = 1.5e-2,
    decay: Decay = 0.35,
    seed: Seed = 0,
    save_minutes: SaveMinutes = 5.0,
) -> None:
    """Train the probes that read videos back, for vgen eval."""
    require_budget(minutes, steps)
    if vae is None:
        folder = checkpoints.resolve("toyland").folder
        assert folder is not None
        vae = folder / "vae"
    require_vae(vae)
    if start:
        from vgen.toyland.probes import load

        load(start)
    make_folder(output)
    from vgen.training.loop import Budget
    from vgen.training.probes import train_probes

    train_probes(
        output,
        vae=vae,
        start=start,
        budget=Budget(minutes=minutes, steps=steps, save_minutes=save_minutes, warmup_steps=50, decay_share=decay),
        passed_clips=passed_clips,
        passed_heads=passed_heads,
        passed_turns=passed_turns,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    print(output / "probes")


@app.command(epilog=EPILOG)
def export(
    vae: Annotated[Path, typer.Option(help="The folder of a trained VAE.")],
    base: Annotated[Path, typer.Option(help="The folder of a base run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint's folder.")],
) -> None:
    """Put a VAE and a base run together: a checkpoint in diffusers' layout, weights in bfloat16."""
    require_vae(vae)
    require_run(base)
    make_folder(output)
    from vgen.training.export import export_checkpoint

    export_checkpoint(vae, base, output)
    print(output)


def parse_clips(text: str) -> tuple[int, int, int, int]:
    """Return (frames, height, width, count) of "17x128x128=4000"."""
    try:
        shape, count = text.split("=")
        frames, height, width = (int(number) for number in shape.split("x"))
        parsed = frames, height, width, int(count)
    except ValueError:
        raise UsageError(f'"{text}" is not FRAMESxHEIGHTxWIDTH=COUNT.', tip="for example 17x128x128=4000.") from None
    if frames % 4 != 1 or height % 16 or width % 16 or min(parsed) < 1:
        raise UsageError(
            f'"{text}": frames are 4k+1, height and width multiples of 16.', tip="for example 17x128x128=4000."
        )
    return parsed


def require_budget(minutes: float | None, steps: int | None) -> None:
    """Raise `UsageError` unless one of the two is given."""
    if (minutes is None) == (steps is None):
        raise UsageError("Training needs --minutes or --steps, one of them.", tip="for example --minutes 25.")


def require_vae(folder: Path) -> None:
    """Raise `UsageError` unless a VAE lies in `folder`."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is not a VAE's folder.", tip="train one: vgen train vae --minutes 25 -o runs/vae.")


def require_text(folder: Path) -> None:
    """Raise `UsageError` unless a text run has saved its weights in `folder`."""
    if not (folder / "text_encoder" / "config.json").is_file():
        raise UsageError(
            f"{folder} is not a text run's folder.", tip="train one: vgen train text --steps 1500 -o runs/text."
        )


def require_run(folder: Path) -> None:
    """Raise `UsageError` unless a base run has saved its weights in `folder`."""
    if not (folder / "transformer" / "config.json").is_file():
        raise UsageError(f"{folder} is not a base run's folder.", tip="train one: vgen train base --help.")


def make_folder(folder: Path) -> None:
    """Make a run's folder; raise `VgenError` where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(folder, error) from error
