"""What a request of an edit becomes once its clip was looked at: everything decided, and no model loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import attention, legal, loras, options
from vgen.checkpoints import Checkpoint, resolve
from vgen.editing import inversions
from vgen.editing.methods import METHODS, Inversion, Method
from vgen.editing.request import EditRequest
from vgen.errors import UsageError
from vgen.plan import Plan
from vgen.plan import plan as planned
from vgen.request import GenerateRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vgen.editing.fitting import Fit, Window
    from vgen.editing.footage import Footage

METHOD = "fireflow"
MASK = "auto"
LONGEST = 1e6  # seconds: days of video


@dataclass(frozen=True, kw_only=True)
class EditPlan:
    """An edit with everything decided.

    `request` has every field given; `shown` is the plan of a video of the target prompt, of the size and length of one
    window. Of the `clip` the model sees the frames `taken` [f], and each of the clip's shows the one of them that
    `frame_of` [F] says. `mask` [F or 1, H, W] is the user's.
    """

    request: EditRequest
    shown: Plan
    method: Method
    clip: Footage
    taken: NDArray[np.int64]
    frame_of: NDArray[np.int64]
    fit: Fit
    windows: tuple[Window, ...]
    mask: NDArray[np.float32] | None
    notes: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """The seed of what is random: FlowEdit's and SDEdit's noise, and that of an automatic mask."""
        return self.shown.seed

    @property
    def inject(self) -> int:
        """In how many steps V is carried over."""
        return self.request.inject or 0

    def to_dict(self) -> dict[str, Any]:
        """Return the request, every field given."""
        return self.request.to_dict()


def plan(request: EditRequest) -> EditPlan:
    """Return the request with everything decided, its clip and its mask read. Loads no model. Raises `UsageError`."""
    if request.lora:
        request = replace(request, lora=tuple(map(loras.anchored, request.lora)))
    if request.noise is not None:
        request = inversions.begin(request)
    method = _method(request)
    checkpoint = resolve(request.model or "toyland")
    check_editable(checkpoint)
    source, notes = _prompts(request)
    strength, inject = _strength(request, method), _inject(request, method)
    request = replace(request, source=source, strength=strength, inject=inject)
    if not 0 <= _given(request.border, 8) <= 256:
        raise UsageError(f"A border of {request.border} pixels is not possible.", tip="choose --border from 0 to 256.")
    _check_part(request)
    if request.mask not in (None, MASK, "none") and not Path(request.mask).exists():
        raise UsageError(
            f"There is no mask {request.mask}.",
            tip="give a picture or a video that is white where to edit, auto, or none.",
        )
    _check_attention(request, method)

    # The clip is looked at last: what is wrong with the words is known before a long file is read.
    from vgen.editing import footage

    width, height = request.width, request.height
    first = _shown(request, checkpoint, width, height, request.num_frames, request.fps)
    clip = footage.read(request.video, start=request.start or 0.0, seconds=request.seconds)
    return _fitted(request, method, checkpoint, clip, first, notes)


def check_editable(checkpoint: Checkpoint) -> None:
    """Raise `UsageError`, with the reason, for a model whose flow cannot be followed from a clip and back."""
    reason = None
    if checkpoint.defaults.timesteps:
        reason = "it was distilled to a few steps, so that it jumps to the data and has no path to invert"
    elif checkpoint.can.needs_image:
        reason = "it makes videos from a first image"
    elif checkpoint.can.audio:
        reason = "it makes picture and sound together, and a clip's sound cannot be taken to its latents"
    if reason:
        raise UsageError(
            f'The model "{checkpoint.name}" cannot edit: {reason}.',
            tip="use a text-to-video model of the same family: vgen models list tells which there are.",
        )


def _method(request: EditRequest) -> Method:
    method = options.parse(_given(request.method, METHOD), METHODS, what="method")()
    if request.target is None and not method.inverts:
        raise UsageError(
            f'The method "{request.method}" does not invert.', tip="choose one of: euler, rf-solver, fireflow."
        )
    if request.noise is not None and not method.inverts:
        raise UsageError(f'The method "{request.method}" takes no noise.', tip="leave out --noise.")
    return method


def _prompts(request: EditRequest) -> tuple[str, list[str]]:
    if request.target is not None and not request.target.strip():
        raise UsageError("The target prompt is empty.", tip="say what the edited clip shows: --target ...")
    if request.source is None:
        return "", [
            "No --source: the clip is inverted without a prompt. A sentence on what it shows makes edits more exact."
        ]
    if request.target is not None and request.source.split() == request.target.split():
        raise UsageError(
            "The source and the target say the same: there is nothing to edit.",
            tip="to see how well the clip survives the way to noise and back, use vgen invert.",
        )
    return request.source, []


def _strength(request: EditRequest, method: Method) -> float:
    strength: float = _given(request.strength, method.strength)
    if not (math.isfinite(strength) and 0 < strength <= 1):
        raise UsageError(f"A strength of {strength:g} is not legal.", tip="choose more than 0 and at most 1.")
    return strength


def _inject(request: EditRequest, method: Method) -> int:
    if not isinstance(method, Inversion):
        if request.inject:
            raise UsageError(
                "--inject carries V over from an inversion, and this method has none.", tip="leave it out."
            )
        return 0
    inject: int = _given(request.inject, method.inject)
    if inject < 0:
        raise UsageError(f"{inject} steps cannot be injected.", tip="choose 0 or more, often 1 to 5.")
    return inject


def _check_attention(request: EditRequest, method: Method) -> None:
    """Raise `UsageError` for sparse attention, or sharing among GPUs, that an inversion does not go with."""
    pattern = attention.parse(request.attention) if request.attention is not None else None
    if pattern is not None and method.inverts and pattern.follows_data:
        raise UsageError(
            f"--attention {request.attention} looks up anew on each way which tokens to attend to: the way back would "
            "not be that of the inversion.",
            tip="use tile, sliding-tile or radial, which are the same both ways, or --method flowedit.",
        )
    if request.noise is not None and request.inject and (request.gpus or 1) > 1:
        raise UsageError(
            "V in a file of vgen invert is of all tokens, and each of several GPUs has a part of them.",
            tip="leave out --gpus, use --inject 0, or leave out --noise: the edit then inverts the clip itself.",
        )


def _check_part(request: EditRequest) -> None:
    for name, value, lowest in (("start", request.start, 0.0), ("seconds", request.seconds, 0.001)):
        if value is not None and not lowest <= value <= LONGEST:
            raise UsageError(
                f"--{name} {value:g} is not legal.",
                tip=f"choose seconds of the clip, from {lowest:g} to {LONGEST:.0f}.",
            )


def _shown(
    request: EditRequest,
    checkpoint: Checkpoint,
    width: int | None,
    height: int | None,
    num_frames: int | None,
    fps: float | None,
) -> Plan:
    """Return the plan of one window, by the rules of generating: legal sizes, steps, scales.

    Raises `UsageError` for compiled blocks with `--inject`, which takes V out of them.
    """
    if request.inject and request.compile:
        raise UsageError(
            "--inject takes V out of the blocks as they run, which those of --compile do not let it.",
            tip="leave out one of them.",
        )
    return planned(
        GenerateRequest(
            prompt=_given(request.target, "-"),
            negative_prompt=request.negative_prompt,
            model=checkpoint.lasting_name,
            seed=request.seed,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            guidance_scale_2=request.guidance_scale_2,
            guidance_interval=request.guidance_interval,
            true_cfg_scale=request.true_cfg_scale,
            width=width,
            height=height,
            num_frames=num_frames,
            fps=fps,
            sampler="euler",
            lora=request.lora,
            attention=request.attention,
            performance=request.performance,
            offload=request.offload,
            compile=False if request.inject else request.compile,
            device=request.device,
            dtype=request.dtype,
            gpus=request.gpus,
            context_parallel=request.context_parallel,
        ),
        checkpoint,
    )


def _fitted(
    request: EditRequest, method: Method, checkpoint: Checkpoint, clip: Footage, first: Plan, notes: list[str]
) -> EditPlan:
    """Return the plan for a clip: its rate, its size, its windows, its mask."""
    from vgen.editing import fitting, masks

    rules = checkpoint.rules
    notes += clip.notes
    if request.fit not in (None, *fitting.WAYS):
        raise UsageError(f'There is no fit "{request.fit}".', tip=f"choose {' or '.join(fitting.WAYS)}.")
    way = _given(request.fit, "pad")
    taken, frame_of, fps = _at_rate(request, clip, first.fps, notes)

    native = checkpoint.sizes or ((checkpoint.defaults.width, checkpoint.defaults.height),)
    width, height = fitting.view_of(clip.size, native, multiple=rules.size_multiple, most=rules.max_size)
    width, height = _given(request.width, width), _given(request.height, height)
    num_frames, overlap = _window(request, checkpoint, len(taken), notes)
    shown = _shown(request, checkpoint, width, height, num_frames, fps)
    fit = fitting.fit(clip.size, (width, height), way)
    if note := fit.note():
        notes.append(note)
    windows = fitting.windows(len(taken), num_frames, overlap)
    if len(windows) > 1:
        notes.append(
            f"The clip has {len(taken)} frames and the model takes {num_frames} at once: it is edited in "
            f"{len(windows)} parts that overlap by {overlap} frames or more and are faded into each other."
        )
    elif num_frames > len(taken):
        notes.append(f"The clip's last frame is held from {len(taken)} frames to {num_frames}, and cut off again.")

    mask = None
    where = _given(request.mask, MASK)
    if where not in (masks.AUTO, masks.NONE):
        mask = masks.read(Path(where), clip, start=request.start or 0.0, seconds=request.seconds)
        where = str(Path(where).resolve())
    complete = replace(
        request,
        video=request.video.resolve(),
        negative_prompt=shown.negative_prompt,
        model=checkpoint.lasting_name,
        seed=shown.seed,
        method=_given(request.method, METHOD),
        num_inference_steps=shown.num_inference_steps,
        lora=shown.lora,
        guidance_scale=shown.guidance_scale,
        guidance_scale_2=shown.guidance_scale_2,
        guidance_interval=shown.guidance_interval,
        true_cfg_scale=shown.true_cfg_scale,
        mask=where,
        border=_given(request.border, masks.BORDER),
        fit=way,
        width=width,
        height=height,
        num_frames=num_frames,
        overlap=overlap,
        fps=fps,
        noise=request.noise.resolve() if request.noise else None,
        gpus=shown.gpus,
        context_parallel=shown.context_parallel,
    )
    notes += shown.notes
    num_steps = max(1, min(int(shown.num_inference_steps * (request.strength or 1)), shown.num_inference_steps))
    if (request.inject or 0) > num_steps:
        raise UsageError(
            f"--inject {request.inject} is more than the {num_steps} steps that there are.",
            tip="choose fewer, often 1 to 5.",
        )
    return EditPlan(
        request=complete,
        shown=shown,
        method=method,
        clip=clip,
        taken=taken,
        frame_of=frame_of,
        fit=fit,
        windows=tuple(windows),
        mask=mask,
        notes=tuple(notes),
    )


def _at_rate(
    request: EditRequest, clip: Footage, model_fps: float, notes: list[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
    """Return which of the clip's frames the model sees, which of those each of the clip's becomes, and the rate.

    By default the model sees all of them, as if they were at its own rate or at theirs.
    """
    import numpy as np

    count = len(clip.frames)
    every = np.arange(count)
    if clip.fps == 0:
        return every, every, _given(request.fps, model_fps)
    if request.fps is None or abs(clip.fps / request.fps - 1) < 0.01:
        if abs(clip.fps / model_fps - 1) >= 0.01:
            faster = clip.fps < model_fps
            times = model_fps / clip.fps if faster else clip.fps / model_fps
            notes.append(
                f"The clip has {clip.fps:g} frames per second and the model learned {model_fps:g}: every frame is "
                f"edited, and to the model all moves {times:.2g} times as {'fast' if faster else 'slowly'}. "
                f"--fps {model_fps:g} resamples it."
            )
        return every, every, clip.fps if clip.fps <= 1000 else model_fps
    number = max(1, round(count * request.fps / clip.fps))
    taken = np.minimum((np.arange(number) * clip.fps / request.fps).round().astype(int), count - 1)
    frame_of = np.clip(np.searchsorted(taken, every, side="right") - 1, 0, number - 1)
    notes.append(
        f"The clip has {clip.fps:g} frames per second and the model sees {request.fps:g}: {count} frames become "
        f"{number}, and the result is at {clip.fps:g} again, with frames held."
    )
    return taken, frame_of, request.fps


def _window(request: EditRequest, checkpoint: Checkpoint, count: int, notes: list[str]) -> tuple[int, int]:
    """Return how many frames the model takes at once, and how many are shared by two windows."""
    rules, usual = checkpoint.rules, checkpoint.defaults.num_frames
    enough = legal.nearest_num_frames(count, rules)[-1]
    window = _given(request.num_frames, min(enough, usual))
    window = legal.closest_num_frames(window, rules)
    overlap = _given(request.overlap, max(0, min(window - 1, (window - 1) // 4)))
    if overlap < 0 or (count > window and overlap >= window):
        raise UsageError(
            f"An overlap of {overlap} frames is not possible: {window} are edited at once.",
            tip=f"choose from 0 to {window - 1}.",
        )
    return window, overlap


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
