"""Many requests in one run: prompt files, and the plans that their lines become."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vgen import backbones, checkpoints, loras
from vgen.checkpoints import Checkpoint
from vgen.conditioning import given
from vgen.errors import UsageError, VgenError, did_you_mean, reason_of
from vgen.plan import Plan, plan
from vgen.request import GenerateRequest

# The words of the command line's options, where they differ from the request's fields.
OPTION_WORDS = {"negative": "negative_prompt", "steps": "num_inference_steps", "frames": "num_frames"}


@dataclass(frozen=True, kw_only=True)
class PromptLine:
    """A request and the line of a prompt file, counted from 1, that it is from; or the error that the line is."""

    number: int | None
    request: GenerateRequest | VgenError


@dataclass(frozen=True, kw_only=True)
class PlannedLine:
    """A video to make; `label` tells it from the others: the line, then which of several seeds, or "" for just one."""

    label: str
    number: int | None
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A video that was not made, by the line and the prompt that asked for it (a broken line has no prompt)."""

    line: int | None
    prompt: str | None
    error: VgenError


def read(path: Path, defaults: Mapping[str, Any]) -> list[PromptLine]:
    """Return the lines of a prompt file that are not blank; `defaults` are request fields that all lines share.

    A line is a prompt. In a .jsonl file, and wherever a line starts with a brace, it is a JSON object instead: a
    prompt and any other fields of a request, which win over `defaults`. Raises `VgenError` when the file cannot be
    read and `UsageError` when it is no text or holds no line at all; a broken line is returned as its error.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise VgenError(
            f"Cannot read the prompts in {path}: {reason_of(error)}.", tip="give a file with a prompt on each line."
        ) from error
    if b"\0" in content:
        raise UsageError(f"{path} is no text in UTF-8.", tip="give a file with a prompt on each line, saved as UTF-8.")
    lines = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if line.strip():
            lines.append(_line(number, line, defaults, is_jsonl=path.suffix.lower() == ".jsonl"))
    if not lines:
        raise UsageError(f"{path} holds no prompts.", tip="write one prompt per line.")
    return lines


def plan_lines(lines: Sequence[PromptLine], seeds: Sequence[int]) -> tuple[list[PlannedLine], list[Failure]]:
    """Return one plan for every line and seed, and the lines that cannot be planned.

    A line that names its own seed keeps it; one without takes each of `seeds`, or a random one when there are none.
    Raises the error of a request that is from no file.
    """
    resolve = functools.cache(checkpoints.resolve)
    planned: list[PlannedLine] = []
    broken: list[Failure] = []
    for line in lines:
        try:
            if isinstance(line.request, VgenError):
                raise line.request
            checkpoint = resolve(line.request.model)
            backbones.require_runnable(checkpoint)
            request = _anchored(line.request, checkpoint)
            takes = [request.seed] if request.seed is not None or not seeds else seeds
            for take, seed in enumerate(takes, start=1):
                parts = (line.number, take if len(takes) > 1 else None)
                label = "-".join(str(part) for part in parts if part is not None)
                made = plan(replace(request, seed=seed), checkpoint)
                planned.append(PlannedLine(label=label, number=line.number, plan=made))
        except VgenError as error:
            if line.number is None:
                raise
            prompt = line.request.prompt if isinstance(line.request, GenerateRequest) else None
            broken.append(Failure(line=line.number, prompt=prompt, error=error))
    return planned, broken


def _anchored(request: GenerateRequest, checkpoint: Checkpoint) -> GenerateRequest:
    """Return the request with absolute paths and a hub revision: it means the same from any folder on any day."""
    files: dict[str, Any] = {
        name: value.absolute() for name, value in vars(request).items() if isinstance(value, Path)
    }
    keyframes = [given.keyframe(text) for text in request.interpolate or ()]
    interpolate = tuple(f"{image.absolute()}@{frame}" for image, frame in keyframes) or None
    lora = tuple(map(loras.anchored, request.lora or ())) or None
    return replace(request, model=checkpoint.lasting_name, lora=lora, interpolate=interpolate, **files)


def _line(number: int, line: bytes, defaults: Mapping[str, Any], *, is_jsonl: bool) -> PromptLine:
    try:
        text = line.decode("utf-8").strip()
        fields = _object(text) if is_jsonl or text.startswith("{") else {"prompt": text}
        return PromptLine(number=number, request=GenerateRequest.from_dict(merge(defaults, fields)))
    except UnicodeDecodeError:
        request = UsageError("The line is not UTF-8 text.", tip="save the file as UTF-8.")
        return PromptLine(number=number, request=request)
    except UsageError as error:
        return PromptLine(number=number, request=error)


def _object(text: str) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise UsageError(f"The line is not valid JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise UsageError("The line is not a JSON object.", tip='write {"prompt": "a red ball", "seed": 7}.')
    known = [*GenerateRequest(prompt="").to_dict(), *OPTION_WORDS]
    for key in fields:
        if key not in known:
            raise UsageError(
                f'There is no field "{key}".{did_you_mean(key, known)}', tip=f"fields: {', '.join(known)}."
            )
    return {OPTION_WORDS.get(key, key): value for key, value in fields.items()}


def merge(defaults: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return request fields over their defaults; a length, in frames or in seconds, takes the place of either."""
    lengths = {"num_frames", "seconds"}
    left_out = lengths if lengths & fields.keys() else set()
    return {**{key: value for key, value in defaults.items() if key not in left_out}, **fields}
