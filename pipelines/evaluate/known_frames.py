"""Known frames, in every use: is what was given still there, and does the rest show what the prompt says?

Each is made twice, with the model told of the frames by its timesteps and by re-injected latents, of the same clips
and noise. What is given is from the prompt's true clip, so that all of the video can be compared with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vgen import checkpoints, outputs
from vgen.conditioning import given, known_frames
from vgen.errors import UsageError, did_you_mean
from vgen.pipelines.evaluate.scores import COLUMNS, decibels, mean_flicker, read_all, score, wrong
from vgen.pipelines.evaluate.trials import Evaluation, Findings, Task, Trial, planned, rendered
from vgen.plan import Plan, plan
from vgen.request import GenerateRequest
from vgen.toyland.prompts import Prompt, truth

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vgen.backbones import Backbone
    from vgen.pipelines.text_to_video import Generation
    from vgen.video import Frames

GIVEN = "given"  # the folder of what is given
SHEET_PROMPTS = 4
GREY = 128  # what is not given, on the sheet


@dataclass(frozen=True, kw_only=True)
class Source:
    """A true clip on disk, of which frames are given: `num_latents` latent ones of `per_latent` after the first.

    `frames` is a folder of all of its frames, `beginning` one of the first half, and `mask` an image whose middle is
    white.
    """

    frames: Path
    beginning: Path
    mask: Path
    num_latents: int
    per_latent: int
    fps: float

    @property
    def half(self) -> int:
        """The last frame of the first half."""
        return self.num_latents // 2 * self.per_latent

    @property
    def last(self) -> int:
        """The last frame."""
        return self.num_latents * self.per_latent

    @property
    def hidden(self) -> range:
        """The frames of the latent ones in the middle."""
        quarter = self.num_latents // 4
        return range(1 + quarter * self.per_latent, 1 + (self.num_latents - quarter) * self.per_latent)

    def picture(self, frame: int) -> Path:
        """Return the image of a frame."""
        return self.frames / f"{frame:05d}.png"


@dataclass(frozen=True, kw_only=True)
class Use:
    """A use of known frames: the request's fields, and the frames of the video that are given, in whole or in part."""

    fields: Callable[[Source], dict[str, Any]]
    frames: Callable[[Source], Sequence[int]]
    is_masked: bool = False

    def known(self, source: Source, width: int, height: int) -> NDArray[np.bool_]:
        """Return which pixels [F, H, W] of the video are given."""
        import numpy as np

        known = np.zeros((source.last + 1, height, width), bool)
        known[list(self.frames(source))] = ~hidden_region(width, height) if self.is_masked else True
        return known


USES: dict[str, Use] = {
    "image": Use(fields=lambda source: {"image": source.picture(0)}, frames=lambda source: [0]),
    "first-and-last": Use(
        fields=lambda source: {"image": source.picture(0), "last_image": source.picture(source.last)},
        frames=lambda source: [0, source.last],
    ),
    "continuation": Use(
        fields=lambda source: {"video": source.beginning, "extend": (source.last - source.half) / source.fps},
        frames=lambda source: range(source.half + 1),
    ),
    "interpolation": Use(
        fields=lambda source: {
            "interpolate": tuple(f"{source.picture(frame)}@{frame}" for frame in (0, source.half, source.last))
        },
        frames=lambda source: [0, source.half, source.last],
    ),
    "missing-frames": Use(
        fields=lambda source: {
            "video": source.frames,
            "missing": f"{source.hidden.start}-{source.hidden.stop - 1}",
        },
        frames=lambda source: [frame for frame in range(source.last + 1) if frame not in source.hidden],
    ),
    "region": Use(
        fields=lambda source: {"video": source.frames, "mask": source.mask},
        frames=lambda source: range(source.last + 1),
        is_masked=True,
    ),
}


def hidden_region(width: int, height: int) -> NDArray[np.bool_]:
    """Return the pixels [H, W] of the middle, half as wide and half as high."""
    import numpy as np

    hidden = np.zeros((height, width), bool)
    hidden[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return hidden


def trials(asked: Evaluation) -> list[Trial]:
    """Return the trials, each with two videos of every use; what is given is written to the folder.

    A model without a timestep per token is tried with re-injected latents alone. Raises `UsageError` for a use that
    is none, and for a model that takes no frames.
    """
    for name in asked.only:
        if name not in USES:
            raise UsageError(
                f'There is no use of known frames "{name}".{did_you_mean(name, USES)}', tip=f"use {', '.join(USES)}."
            )
    checkpoint = checkpoints.resolve(asked.model)
    ways = known_frames.WAYS if checkpoint.can.known_frames else ("reinject",)
    uses = [name for name in USES if not asked.only or name in asked.only]
    plain = plan(GenerateRequest(prompt=asked.prompts[0].text, model=asked.model, seed=0, **asked.fields), checkpoint)
    sources = [source_of(asked.folder, index, plain) for index in range(asked.num_prompts)]
    for source, prompt in zip(sources, asked.prompts, strict=True):
        write(source, rendered(prompt, plain), plain)

    def variants(index: int, prompt: Prompt) -> dict[str, dict[str, Any]]:
        wanted = [(name, way) for name in uses for way in ways]
        return {f"{name}/{way}": {**USES[name].fields(sources[index]), "known_frames": way} for name, way in wanted}

    found = planned(asked, variants)
    return [
        replace(
            trial,
            made={
                name: replace(job, measure=functools.partial(agreement, name.split("/")[0], source, job.plan))
                for name, job in trial.made.items()
            },
        )
        for trial, source in zip(found, sources, strict=True)
    ]


def source_of(folder: Path, index: int, plain: Plan) -> Source:
    """Return where the true clip of prompt `index` lies in an evaluation's folder, and how it is divided."""
    per_latent = plain.checkpoint.rules.frame_multiple
    inside = folder.absolute() / GIVEN
    return Source(
        frames=inside / f"{index:03d}.png",
        beginning=inside / f"{index:03d}-beginning.png",
        mask=inside / "mask.png",
        num_latents=(plain.num_frames - 1) // per_latent,
        per_latent=per_latent,
        fps=plain.fps,
    )


def write(source: Source, frames: Frames, plain: Plan) -> None:
    """Write what is given of a true clip's frames, without loss."""
    from PIL import Image

    from vgen import files, video

    outputs.prepare_folder(source.frames)
    video.save(frames, source.frames, fps=plain.fps)
    video.save(frames[: source.half + 1], source.beginning, fps=plain.fps)
    with files.atomic(source.mask) as part:
        Image.fromarray(hidden_region(plain.width, plain.height)).save(part)


def agreement(
    use: str, source: Source, planned_as: Plan, generation: Generation, backbone: Backbone
) -> dict[str, float]:
    """Return mean squared errors, between levels of 0 to 255.

    `given`: of the video's known pixels to what was given. `vae`: of the VAE's own reconstruction to that. `model`:
    of what the model made, before what was given is put back, to that reconstruction. `made`: of the rest of the video
    to the true clip.
    """
    from vgen import video

    true = video.read(source.frames).frames
    known = USES[use].known(source, planned_as.width, planned_as.height)
    # Told in this way, a first image is a canvas like all others.
    used = given.of(replace(planned_as, known_frames="reinject"))
    assert used is not None and used.num_windows == 1
    canvas = used.canvas([])
    at = canvas.known & known  # not the frames over which a picture stands still
    (window,) = generation.windows
    reconstruction = reconstructed(replace(planned_as, known_frames="reinject"), cast(Any, backbone))
    return {
        "given": squared_error(generation.frames, true, known),
        "vae": squared_error(reconstruction, canvas.frames, at),
        "model": squared_error(window, reconstruction, at),
        "made": squared_error(generation.frames, true, ~known),
    }


@functools.lru_cache(maxsize=1)  # both ways of a use have the same
def reconstructed(planned_as: Plan, backbone: Backbone) -> Frames:
    """Return what the VAE leaves of what a plan gives."""
    from vgen.pipelines import text_to_video

    used = given.of(planned_as)
    assert used is not None
    return text_to_video.rebuild(planned_as, used.canvas([]).filled(), backbone).frames


def squared_error(one: Frames, other: Frames, where: NDArray[np.bool_]) -> float:
    """Return the mean squared difference of frames uint8 [F, H, W, 3] at pixels bool [F, H, W]."""
    import numpy as np

    return float(np.square(one[where].astype(np.float32) - other[where]).mean())


def read(found: Sequence[Trial]) -> Findings:
    """Return the scores, under `known_frames`, by use and by how the model is told.

    Each has decibels of all trials together, as `agreement` tells them (None: no difference), and the probes'
    readings, as for text to video. `ceiling` has the readings of the true clips after the VAE.
    """
    from vgen import manifest, video

    fps = found[0].real.plan.fps
    truths = [truth(trial.prompt.clip) for trial in found]
    scores: dict[str, dict[str, Any]] = {}
    details: list[dict[str, Any]] = []
    shown: dict[str, dict[str, tuple[list[Frames], list[str]]]] = {}
    for name in found[0].made:
        use, way = name.split("/")
        paths = [trial.made[name].output for trial in found]
        videos = [video.read(path).frames for path in paths]
        readings = read_all(videos, fps)
        errors = [manifest.read(path)["measured"] for path in paths]
        scores.setdefault(use, {})[way] = {
            **{f"{key}_db": decibels(sum(one[key] for one in errors) / len(errors)) for key in errors[0]},
            **score(readings, truths),
            "flicker": mean_flicker(videos),
        }
        details += [
            {
                "output": str(path),
                "use": use,
                "told_by": way,
                "truth": told,
                "reading": reading.to_dict(),
                **{f"{key}_db": decibels(value) for key, value in error.items()},
            }
            for path, told, reading, error in zip(paths, truths, readings, errors, strict=True)
        ]
        mistakes = [wrong(reading, told) for reading, told in zip(readings, truths, strict=True)]
        shown.setdefault(use, {})[way] = (videos[:SHEET_PROMPTS], mistakes[:SHEET_PROMPTS])
    genuine = [video.read(trial.real.output).frames for trial in found]
    rows, labels = [], []
    for use, by_way in shown.items():
        for index, trial in enumerate(found[:SHEET_PROMPTS]):
            source = source_of(trial.real.output.parents[1], index, trial.real.plan)
            made = [videos[index] for videos, _ in by_way.values()]
            rows.append([picture_of_given(use, source), *made, genuine[index]])
            said = "   ".join(f"[{way}: {mistakes[index]}]" for way, (_, mistakes) in by_way.items())
            labels.append(f"{use}: {trial.prompt.text}   {said}")
    return Findings(
        scores={
            "known_frames": scores,
            "ceiling": {**score(read_all(genuine, fps), truths), "flicker": mean_flicker(genuine)},
        },
        details={"videos": details},
        rows=rows,
        labels=labels,
    )


def picture_of_given(use: str, source: Source) -> Frames:
    """Return the true clip with grey over what a use is not given."""
    import numpy as np

    from vgen import video

    true = video.read(source.frames).frames
    known = USES[use].known(source, true.shape[2], true.shape[1])
    pictured: Frames = np.where(known[..., None], true, np.uint8(GREY))
    return pictured


def table(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a report."""
    rows = [(f"{use}, {way}", row) for use, by_way in report["known_frames"].items() for way, row in by_way.items()]
    return [*rows, ("ceiling", report["ceiling"])]


TASK = Task(
    trials=trials,
    read=read,
    table=table,
    columns=("given_db", "vae_db", "model_db", "made_db", *COLUMNS),
    parts=tuple(USES),
)
