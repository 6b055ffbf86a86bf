"""How well a model does its tasks: held-out prompts → videos → readings → a report and a sheet to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vgen import files, manifest
from vgen.pipelines import run
from vgen.pipelines.evaluate import edit, generate, known_frames
from vgen.pipelines.evaluate.trials import SETTINGS, Evaluation, Findings, Task, Trial
from vgen.pipelines.run import Job, Report, Watch

TASKS: dict[str, Task] = {"generate": generate.TASK, "known-frames": known_frames.TASK, "edit": edit.TASK}
REPORT, SHEET = "report.json", "sheet.png"
SHEET_ROWS = 24


def evaluate(asked: Evaluation, found: Sequence[Trial], jobs: Sequence[Job], *, watch: Watch) -> dict[str, Any]:
    """Run the jobs that are `trials.missing`, and return the task's report of all videos.

    The report is in the folder, too, beside the sheet.
    """
    for parent in {job.output.parent for job in jobs}:
        parent.mkdir(parents=True, exist_ok=True)
    account = run.generate(jobs, watch=watch)
    findings = TASKS[asked.task].read(found)
    report = {**findings.scores, **facts(asked, found, account), **findings.details}
    files.write_text(asked.folder / REPORT, json.dumps(report, indent=1) + "\n")
    draw_sheet(asked, findings)
    return report


def facts(asked: Evaluation, found: Sequence[Trial], account: Report) -> dict[str, Any]:
    """Return what tells how a score came about: the model, the settings, the seeds, the costs of this run."""
    plan = found[0].real.plan
    settings = (*SETTINGS, "guidance_interval", "sampler", "negative_prompt")
    return {
        "model": plan.model,
        "checkpoint": manifest.identity(plan.checkpoint),
        "prompts": len(found),
        "seeds": [trial.real.plan.seed for trial in found],
        "settings": {name: getattr(plan, name) for name in settings},
        "report": str(asked.folder / REPORT),
        "sheet": str(asked.folder / SHEET),
        "newly_made": len(account.made),
        "timings": {stage: round(seconds, 3) for stage, seconds in account.timings.items()},
    }


def draw_sheet(asked: Evaluation, findings: Findings) -> None:
    """Write a picture of the first rows, each with its label above."""
    import torch

    from vgen.toyland.samples import labelled_sheet

    rows = [[torch.tensor(frames) for frames in row] for row in findings.rows[:SHEET_ROWS]]
    with files.atomic(asked.folder / SHEET) as part:
        labelled_sheet(rows, findings.labels[:SHEET_ROWS]).save(part)
