"""One video on several GPUs: the processes that share the work, and what comes back from them."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from vgen import checkpoints, errors, outputs, runtime
from vgen.errors import UsageError, VgenError
from vgen.pipelines import run
from vgen.pipelines.run import Job, Report, Watch
from vgen.plan import check_parallel

# Shows the progress of so many jobs; a function of a module, since every process imports it anew.
Shown = Callable[[int], AbstractContextManager[Watch]]


def num_gpus(jobs: Sequence[Job]) -> int:
    """Return how many GPUs share each of the jobs; raise `UsageError` where they do not agree."""
    numbers = sorted({job.plan.gpus or 1 for job in jobs})
    if len(numbers) > 1:
        raise UsageError(
            f"Some lines ask for {numbers[0]} GPUs and some for {numbers[-1]}.",
            tip="give one number for all of them, with --gpus.",
        )
    return numbers[0] if numbers else 1


def generate(jobs: Sequence[Job], *, shown: Shown, keep_latents: bool = False) -> Report:
    """Make every job's video on the GPUs that the jobs ask for, and return the account of it.

    A process for each GPU does what `run.generate` does, and all attend to one another's tokens (torchrun's elastic
    agent in this process starts and watches them). The first one shows progress and writes. A job that fails ends the
    run: where a single process fails, the others cannot know how far it came. Raises `VgenError`, once, with what the
    process that failed had to say.
    """
    number, device = num_gpus(jobs), jobs[0].plan.device
    from torch import distributed

    if not distributed.is_available():
        raise VgenError("This build of torch has no torch.distributed, which --gpus needs.", tip="leave out --gpus.")
    runtime.check_gpus(device, number)
    jobs = _fetched(jobs, shown)

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="vgen-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=number,
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            shutdown_timeout=5,
            # What the libraries print, they print once.
            logs_specs=DefaultLogsSpecs(folder, redirects=dict.fromkeys(range(1, number), Std.ALL)),
        )
        # The agent's own log repeats what is told here.
        logging.disable(logging.CRITICAL)
        try:
            done: dict[int, Report] = elastic_launch(config, _rank)(jobs, shown, keep_latents, Path(folder))
        except SignalException as stopped:
            if stopped.sigval != signal.SIGINT:
                raise SystemExit(128 + stopped.sigval) from None
            raise KeyboardInterrupt(_kept(jobs)) from None
        except ChildFailedError as failed:
            raise _error(Path(folder), failed) from None
        finally:
            logging.disable(logging.NOTSET)
    return done[0]


def _rank(jobs: Sequence[Job], shown: Shown, keep_latents: bool, folder: Path) -> Report:
    """Do one process's share; where that fails, leave word in the folder and end at once."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        runtime.join(rank, num_ranks, jobs[0].plan.device)
        from torch import distributed

        if rank == 0:
            with shown(len(jobs)) as watch:
                report = run.generate(jobs, watch=watch, keep_latents=keep_latents)
        else:
            report = run.generate(jobs, watch=Watch(), writes=False)
        distributed.destroy_process_group()
        return report
    except KeyboardInterrupt:
        # Not as an exception, which would be printed, nor by way of exit handlers, which may wait for the others.
        os._exit(128 + signal.SIGINT)
    except Exception as error:
        _leave_word(folder / f"{rank}.json", rank, error)


def _leave_word(path: Path, rank: int, error: Exception) -> NoReturn:
    # What is not meant for people is, most often, what became of another process's failure.
    told: dict[str, Any] = {"kind": "VgenError", "message": f"GPU process {rank} failed: {error!r}", "tip": None}
    if isinstance(error, VgenError):
        told = {"kind": type(error).__name__, "message": error.message, "tip": error.tip}
    path.write_text(json.dumps({**told, "for_people": isinstance(error, VgenError)}), encoding="utf-8")
    os._exit(1)


def _error(folder: Path, failed: Any) -> VgenError:
    """Return what the processes had to say, from the one that knew best, or how the first of them ended."""
    told = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if told:
        best = max(told, key=lambda word: word["for_people"])
        kind: type[VgenError] = getattr(errors, best["kind"])
        return kind(best["message"], tip=best["tip"])
    rank, failure = failed.get_first_failure()
    ended = f"by {failure.signal_name()}" if failure.exitcode < 0 else f"with exit code {failure.exitcode}"
    tip = "the memory may have run out: try fewer --frames, or a smaller --width and --height."
    return VgenError(
        f"GPU process {rank} was ended {ended}.", tip=tip if failure.exitcode == -signal.SIGKILL else None
    )


def _fetched(jobs: Sequence[Job], shown: Shown) -> list[Job]:
    """Return the jobs with their checkpoints on this machine, downloaded once, and checked again where they were."""
    found = {}
    for job in jobs:
        if job.plan.model not in found:
            with shown(len(jobs)) as watch:
                found[job.plan.model] = checkpoints.fetch(job.plan.checkpoint, watch.download)
    fetched = [replace(job, plan=replace(job.plan, checkpoint=found[job.plan.model])) for job in jobs]
    for job in fetched:
        check_parallel(job.plan)
    return fetched


def _kept(jobs: Sequence[Job]) -> str:
    kept = [str(path) for job in jobs if (path := outputs.latents_path(job.output)).exists()]
    return f"The latents are kept in {kept[-1]}." if kept else ""
