"""What a run is doing, on stderr: a bar in a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vgen.pipelines.run import Job, Watch

DOING = {
    "load": "Loading the model",
    "encode": "Reading the prompt",
    "denoise": "Denoising",
    "decode": "Decoding",
    "write": "Writing",
}


@contextmanager
def shown(num_jobs: int) -> Iterator[Watch]:
    """Yield what a run tells its progress to."""
    console = Console(stderr=True)
    if console.is_terminal:
        with _bars(console, num_jobs) as watch:
            yield watch
    else:
        yield _lines(num_jobs)


@contextmanager
def _bars(console: Console, num_jobs: int) -> Iterator[Watch]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        begun = 0
        videos = progress.add_task("Videos", total=num_jobs, count="", visible=num_jobs > 1)
        stage = progress.add_task("", total=None, count="")

        def on_job(job: Job) -> None:
            nonlocal begun
            progress.update(videos, completed=begun, count=f"{begun}/{num_jobs}")
            begun += 1

        def on_stage(name: str) -> None:
            nonlocal stage
            progress.remove_task(stage)
            stage = progress.add_task(DOING[name], total=None, count="")

        def on_step(step: int, num_steps: int) -> None:
            progress.update(stage, completed=step, total=num_steps, count=f"{step}/{num_steps}")

        yield Watch(on_job=on_job, on_stage=on_stage, on_step=on_step, on_warning=warn)


def _lines(num_jobs: int) -> Watch:
    def on_job(job: Job) -> None:
        if num_jobs > 1:
            say(f"{job.output}:")

    return Watch(on_job=on_job, on_stage=lambda name: say(f"{DOING[name]} ..."), on_warning=warn)


def warn(message: str) -> None:
    """Write a warning to stderr."""
    say(f"Warning: {message}")


def say(message: str) -> None:
    """Write a message for people to stderr."""
    print(message, file=sys.stderr, flush=True)
