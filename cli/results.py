"""What a run has made, on stdout: for people, or as one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from vgen.batch import Failure
from vgen.cli.progress import say
from vgen.pipelines.run import Job, Report


class Format(StrEnum):
    """How results are printed."""

    text = "text"
    json = "json"


def show_report(report: Report, form: Format) -> None:
    """Print what was made and what it cost; failures go to stderr, too."""
    _say_failures(report.failures)
    if form is Format.json:
        print(json.dumps(_as_json(report)))
        return
    for job in report.made:
        print(job.output)
    for latents in report.latents:
        print(latents)
    print(_breakdown(report))


def show_plans(jobs: Sequence[Job], failures: Sequence[Failure], form: Format) -> None:
    """Print what a run would make, without making it."""
    _say_failures(failures)
    if form is Format.json:
        plans = [{"output": str(job.output), **job.plan.to_dict()} for job in jobs]
        print(json.dumps({"dry_run": True, "plans": plans, "failures": _failures_as_json(failures)}))
        return
    for job in jobs:
        checkpoint = job.plan.checkpoint
        size_mb = sum(file.size for file in checkpoint.files) / 1e6
        print(f"{job.output}\n  checkpoint: {checkpoint.folder or checkpoint.repo} ({checkpoint.family}", end="")
        print(f", {size_mb:.1f} MB)" if size_mb else ")")
        for name, value in job.plan.to_dict().items():
            print(f"  {name}: {value}")


def _breakdown(report: Report) -> str:
    stages = "  ".join(f"{stage} {seconds:.2f} s" for stage, seconds in report.timings.items())
    vram = f"  peak GPU memory {report.peak_vram_mb:.0f} MB" if report.peak_vram_mb else ""
    return f"{stages}  peak memory {report.peak_memory_mb:.0f} MB{vram}"


def _say_failures(failures: Sequence[Failure]) -> None:
    for failure in failures:
        say(f"Error in line {failure.line}: {failure.error}")


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "outputs": [str(job.output) for job in report.made],
        "seeds": [job.plan.seed for job in report.made],
        "latents": [str(path) for path in report.latents],
        "timings": {stage: round(seconds, 3) for stage, seconds in report.timings.items()},
        "peak_memory_mb": round(report.peak_memory_mb, 1),
        "peak_vram_mb": round(report.peak_vram_mb, 1),
        "warnings": report.warnings,
        "failures": _failures_as_json(report.failures),
    }


def _failures_as_json(failures: Sequence[Failure]) -> list[dict[str, Any]]:
    return [{"line": failure.line, "prompt": failure.prompt, "error": str(failure.error)} for failure in failures]
