"""What every family is asked: does vgen see the model as stock diffusers does?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vgen import backbones
from vgen.checkpoints import resolve
from vgen.plan import Plan, plan
from vgen.request import GenerateRequest
from vgen.runtime import choose, noise_generator

TOLERANCE = 1e-5


def loaded(folder: Path, dtype: str = "float32", *, decode_only: bool = False) -> Any:
    return backbones.load(resolve(str(folder)), choose("cpu", dtype), decode_only=decode_only)


def planned(folder: Path, prompt: str, **values: Any) -> Plan:
    return plan(GenerateRequest(model=str(folder), prompt=prompt, **values), resolve(str(folder)))


def shot_of(num_frames: int, height: int, width: int) -> backbones.Shot:
    return backbones.Shot(num_frames=num_frames, height=height, width=width, fps=8, generator=noise_generator(7))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one.float() - other.float()).abs().max().item()


class Lengths:
    """The lengths of the sequences that a module's attention was called with: (video, text) tokens per call."""

    def __init__(self, slot: nn.Module) -> None:
        self.seen: list[tuple[int, int]] = []
        self.handle = slot.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, arguments: tuple[Any, ...], values: dict[str, Any]) -> None:
        hidden_states = values["hidden_states"] if "hidden_states" in values else arguments[0]
        text = values.get("encoder_hidden_states")
        self.seen.append((hidden_states.shape[1], 0 if text is None else text.shape[1]))


def reinstall(slots: list[nn.Module]) -> None:
    """Set on every slot a new processor of the class that it has."""
    for slot in slots:
        slot.set_processor(type(slot.processor)())  # type: ignore[operator]


def on_meta(model: Any, **config: Any) -> Any:
    """Return a model of a configuration that has shapes and no memory."""
    with torch.device("meta"):
        return model(**config)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
