"""The schedulers of diffusers as the loop sees them: their sigmas, and their own steps."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgen.checkpoints import Checkpoint
from vgen.errors import CheckpointError, UsageError


class FlowScheduler:
    """A diffusers scheduler of a rectified flow, to which a model's output is the velocity itself."""

    def __init__(self, scheduler: Any, generator: torch.Generator) -> None:
        self._scheduler = scheduler
        self._options = step_options(scheduler, generator)

    def step(self, i: int, velocity: Tensor, latents: Tensor) -> Tensor:
        """Return the latents after step i."""
        timestep = self._scheduler.timesteps[i]
        stepped: Tensor = self._scheduler.step(velocity, timestep, latents, **self._options, return_dict=False)[0]
        return stepped


def step_options(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    """Return what a scheduler's `step` takes besides output, timestep and latents: the generator, if any."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


def flow_scheduler(checkpoint: Checkpoint, scheduler: Any, generator: torch.Generator) -> FlowScheduler:
    """Return the native scheduler of a flow model; `scheduler` has its timesteps set, and is copied.

    Raises `CheckpointError` where the scheduler is made for another kind of model.
    """
    predicted = scheduler.config.get("prediction_type", "flow_prediction")
    if predicted != "flow_prediction":
        raise CheckpointError(
            f'The sampler "native" cannot step the {type(scheduler).__name__} of "{checkpoint.name}": it is set to '
            f'"{predicted}", and the model predicts a flow.',
            tip="use --sampler euler, or correct prediction_type in scheduler/scheduler_config.json.",
        )
    return FlowScheduler(copy.deepcopy(scheduler), generator)


def sigmas_of(scheduler: Any) -> Tensor:
    """Return the sigmas that a scheduler was set to, float32 [N + 1] on the CPU."""
    sigmas: Tensor = scheduler.sigmas
    return sigmas.float().cpu()


def set_straight_timesteps(scheduler: Any, num_inference_steps: int) -> None:
    """Set a flow scheduler to sigmas on a straight line from 1 to 0, before a shift of its own."""
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1])


def set_shifted_timesteps(
    scheduler: Any, num_inference_steps: int, num_tokens: int, *, base: tuple[int, float], most: tuple[int, float]
) -> None:
    """Set a flow scheduler to evenly spaced sigmas, shifted by how many tokens a video has.

    The shift mu is a line through `base` and `most` = (tokens, shift), each of the four replaced by what the
    scheduler's configuration says (Esser et al. 2024, arXiv:2403.03206, section 5.3.2). Raises `UsageError` for one
    step where the last but one sigma is set (`shift_terminal`), as the first one is 1.
    """
    config = scheduler.config
    if num_inference_steps == 1 and config.get("shift_terminal"):
        raise UsageError("One step is too few for the schedule of this model.", tip="use --steps 2 or more.")
    base_tokens, base_shift = config.get("base_image_seq_len", base[0]), config.get("base_shift", base[1])
    most_tokens, most_shift = config.get("max_image_seq_len", most[0]), config.get("max_shift", most[1])
    slope = (most_shift - base_shift) / (most_tokens - base_tokens)
    mu = num_tokens * slope + (base_shift - slope * base_tokens)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), mu=mu)
