"""Text to video: does the video show what the prompt says?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vgen.pipelines.evaluate.scores import COLUMNS, floor, mean_flicker, plain_score, read_all, score, wrong
from vgen.pipelines.evaluate.trials import Evaluation, Findings, Task, Trial, planned
from vgen.toyland.prompts import truth

MADE = "made"


def trials(asked: Evaluation) -> list[Trial]:
    """Return the trials: one video of each prompt."""
    return planned(asked, lambda index, prompt: {MADE: {}})


def read(found: Sequence[Trial]) -> Findings:
    """Return the score of the videos.

    Its keys `scene`, `colour`, `shape`, `size`, `action`, `camera` and `joint` are the shares of videos in which the
    probes read what the prompt says; `ceiling` has the same of real clips after the model's VAE, and `floor` of the
    model's videos against the other prompts. What cannot be read counts as wrong.
    """
    from vgen import video

    made = [video.read(trial.made[MADE].output).frames for trial in found]
    genuine = [video.read(trial.real.output).frames for trial in found]
    both = read_all([*made, *genuine], found[0].real.plan.fps)
    readings, of_real = both[: len(made)], both[len(made) :]
    truths = [truth(trial.prompt.clip) for trial in found]
    return Findings(
        scores={
            **score(readings, truths),
            "flicker": mean_flicker(made),
            "ceiling": {**score(of_real, truths), "flicker": mean_flicker(genuine)},
            "floor": floor(readings, truths),
            "without_learning": {"made": plain_score(made, truths), "real": plain_score(genuine, truths)},
        },
        details={
            "videos": [
                {
                    "output": str(trial.made[MADE].output),
                    "prompt": trial.prompt.text,
                    "seed": trial.real.plan.seed,
                    "truth": told,
                    "reading": reading.to_dict(),
                    "confidence": {name: round(value, 3) for name, value in reading.confidences.items()},
                    "ceiling": genuine_reading.to_dict(),
                }
                for trial, told, reading, genuine_reading in zip(found, truths, readings, of_real, strict=True)
            ]
        },
        rows=[list(pair) for pair in zip(made, genuine, strict=True)],
        labels=[
            f"{trial.prompt.text}   [{wrong(reading, told)}]"
            for trial, told, reading in zip(found, truths, readings, strict=True)
        ],
    )


def table(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a report."""
    return [("model", report), ("ceiling", report["ceiling"]), ("floor", report["floor"])]


TASK = Task(trials=trials, read=read, table=table, columns=COLUMNS)
