"""What a run is doing, on stderr: a bar in a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        videos = progress.add_task("Videos", total=num_jobs, completed=-1, visible=num_jobs > 1)
        stage = progress.add_task("", total=None)

        def on_stage(name: str) -> None:
            progress.reset(stage, total=None, description=DOING[name])

        yield Watch(
            on_job=lambda job: progress.advance(videos),
            on_stage=on_stage,
            on_step=lambda step, num_steps: progress.update(stage, completed=step, total=num_steps),
        )


def _lines(num_jobs: int) -> Watch:
    def on_job(job: Job) -> None:
        if num_jobs > 1:
            say(f"{job.output}:")

    return Watch(on_job=on_job, on_stage=lambda name: say(f"{DOING[name]} ..."))


def say(message: str) -> None:
    """Write a message for people to stderr."""
    print(message, file=sys.stderr, flush=True)
