"""What a run is doing, on stderr: a bar in a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vgen import hub
from vgen.hub import Listing, readable
from vgen.pipelines.run import Job, Watch

DOING = {
    "load": "Loading the model",
    "encode": "Reading the prompt",
    "mask": "Finding what the prompts differ in",
    "invert": "Inverting",
    "check": "Going back, to measure the inversion",
    "denoise": "Denoising",
    "decode": "Decoding",
    "measure": "Measuring",
    "write": "Writing",
    "calibrate": "Calibrating",
    "quantize": "Quantizing",
    "compare": "Making videos to compare",
    "report": "Reading them",
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
def restored() -> Iterator[None]:
    """Give the terminal its cursor back, which a process that draws a bar and is ended leaves hidden."""
    try:
        yield
    finally:
        Console(stderr=True).show_cursor()


@contextmanager
def _bars(console: Console, num_jobs: int) -> Iterator[Watch]:
    with _progress(console) as progress:
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

        download = _download_bar(progress)
        yield Watch(on_job=on_job, on_stage=on_stage, on_step=on_step, on_warning=warn, on_note=say, download=download)


def _lines(num_jobs: int) -> Watch:
    begun, start = 0, time.monotonic()

    def on_job(job: Job) -> None:
        nonlocal begun
        if num_jobs > 1:
            left = f", about {duration((time.monotonic() - start) / begun * (num_jobs - begun))} left" if begun else ""
            begun += 1
            say(f"{job.output} ({begun}/{num_jobs}{left}):")

    def on_stage(name: str) -> None:
        say(f"{DOING[name]} ...")

    return Watch(on_job=on_job, on_stage=on_stage, on_warning=warn, on_note=say, download=_download_lines())


@contextmanager
def downloads() -> Iterator[hub.Progress]:
    """Yield what a download tells its progress to, outside of a run."""
    console = Console(stderr=True)
    if console.is_terminal:
        with _progress(console) as progress:
            yield _download_bar(progress)
    else:
        yield _download_lines()


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    return Progress(*columns, console=console, transient=True)


def _download_bar(progress: Progress) -> hub.Progress:
    task, done, total = None, 0, 0

    def on_begin(listing: Listing, missing: int) -> None:
        nonlocal task, done, total
        if missing:
            done, total = 0, missing
            progress.console.print(_begins(listing, missing), highlight=False)
            task = progress.add_task("Downloading", total=total, count=f"0/{readable(total)}")

    def on_bytes(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if task is not None:
            progress.update(task, completed=done, count=f"{readable(done)}/{readable(total)}")

    def on_end() -> None:
        nonlocal task
        if task is not None:
            progress.remove_task(task)
            task = None

    return hub.Progress(on_begin=on_begin, on_bytes=on_bytes, on_end=on_end)


def _download_lines() -> hub.Progress:
    done, total = 0, 0

    def on_begin(listing: Listing, missing: int) -> None:
        nonlocal done, total
        if missing:
            done, total = 0, missing
            say(_begins(listing, missing))

    def on_bytes(num_bytes: int) -> None:
        nonlocal done
        tenths = done * 10 // total if total else 0
        done += num_bytes
        if total and done * 10 // total > tenths:
            say(f"  {readable(done)} of {readable(total)}")

    return hub.Progress(on_begin=on_begin, on_bytes=on_bytes)


def _begins(listing: Listing, missing: int) -> str:
    kept = f" (of {readable(listing.size)}; the rest is here)" if missing < listing.size else ""
    return f"Downloading {listing.repo}: {readable(missing)}{kept}, to {hub.folder(listing.repo, listing.commit)}"


def duration(seconds: float) -> str:
    """Return a time in seconds for people, in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def warn(message: str) -> None:
    """Write a warning to stderr."""
    say(f"Warning: {message}")


def say(message: str) -> None:
    """Write a message for people to stderr."""
    print(message, file=sys.stderr, flush=True)
