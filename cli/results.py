"""What a run has made, on stdout: for people, or as one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from typing import Any

from vgen import manifest
from vgen.batch import Failure
from vgen.checkpoints import Checkpoint
from vgen.cli.progress import say
from vgen.hub import readable
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
    for did in report.attention:
        say(attention_note(did))
    print(breakdown(report))


def show_plans(jobs: Sequence[Job], failures: Sequence[Failure], form: Format) -> None:
    """Print what a run would make, without making it."""
    _say_failures(failures)
    if form is Format.json:
        plans = [
            {"output": str(job.output), **job.plan.to_dict(), "chosen": job.plan.settings.to_dict()} for job in jobs
        ]
        print(json.dumps({"dry_run": True, "plans": plans, "failures": _failures_as_json(failures)}))
        return
    for job in jobs:
        checkpoint = job.plan.checkpoint
        size = sum(file.size for file in checkpoint.files)
        print(f"{job.output}\n  checkpoint: {checkpoint.folder or checkpoint.repo} ({checkpoint.family}", end="")
        print(f", {readable(size)})" if size else ")")
        if checkpoint.folder is None:
            to_come = f": {checkpoint.download_gb:g} GB" if checkpoint.download_gb else ""
            print(f"  to be downloaded{to_come}")
        for lora in checkpoint.loras:
            where = lora.path or f"{lora.name}, to be downloaded"
            print(f"  LoRA on the {lora.component}: {where}, scale {lora.scale:g}")
        if (weights := checkpoint.weights_gb() or 0) >= 0.1:
            print(f"  memory for weights: {weights:.1f} GB, offloaded {checkpoint.weights_gb(offload=True):.1f} GB")
        show_facts(job.plan.to_dict(), "  ")
        show_facts({"chosen": job.plan.settings.to_dict()}, "  ")


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what is known of a checkpoint as values that JSON can hold."""
    known = asdict(checkpoint)
    gigabytes = {"whole": checkpoint.weights_gb(), "offload": checkpoint.weights_gb(offload=True)}
    files = known["files"] or manifest.identity(checkpoint)["files"]
    return {
        **known,
        "folder": str(checkpoint.folder) if checkpoint.folder else None,
        "weights_gb": {name: value and round(value, 1) for name, value in gigabytes.items()},
        "files": files,
        "loras": [lora.to_dict() for lora in checkpoint.loras],
    }


def show_facts(values: dict[str, Any], indent: str = "") -> None:
    """Print what is known of a checkpoint or a run, a line for each fact; what is empty is left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            shown = {key: inner for key, inner in value.items() if inner not in (None, "", False)}
            if shown:
                print(f"{indent}{name}:")
                show_facts(shown, indent + "  ")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            print(f"{indent}{name}:")
            for item in value:
                print(f"{indent}  {_line(item)}")
        elif value not in (None, "", (), []):
            print(f"{indent}{name}: {value}")


def attention_note(did: dict[str, Any]) -> str:
    """Return in a sentence what sparse attention really left out."""
    if not did["sparse_calls"]:
        return f"Attention: {did['pattern']} left out nothing; all {did['calls']} calls were dense."
    return (
        f"Attention: {did['pattern']}, run by {did['kernel']}, left out {did['sparsity']:.1%} of the pairs of tokens: "
        f"{did['sparsity_when_sparse']:.1%} in {did['sparse_calls']} of {did['calls']} calls, nothing in the others."
    )


def _line(item: dict[str, Any]) -> str:
    if {"path", "size", "sha256"} <= item.keys():
        return f"{item['path']}  {item['size']} bytes  sha256 {item['sha256'] or 'not computed'}"
    return "  ".join(str(value) for value in item.values() if value is not None)


def breakdown(report: Report) -> str:
    """Return the seconds of each stage and the most memory held, in a line."""
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
        "attention": report.attention,
        "warnings": report.warnings,
        "failures": _failures_as_json(report.failures),
    }


def _failures_as_json(failures: Sequence[Failure]) -> list[dict[str, Any]]:
    return [{"line": failure.line, "prompt": failure.prompt, "error": str(failure.error)} for failure in failures]
