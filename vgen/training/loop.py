"""The one training loop: accelerate, EMA, warm-up and decay, a budget in minutes or steps, exact resume."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train, and how often to save. Give `minutes` or `steps`; only `steps` repeats bit for bit."""

    minutes: float | None = None
    steps: int | None = None
    save_minutes: float = 5.0
    log_steps: int = 20
    warmup_steps: int = 100
    decay_share: float = 0.35
    """The last share of the budget, over which the learning rate falls to zero."""


@dataclass
class Progress:
    """How far training has come; saved with the weights."""

    step: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, float]:
        """Return the state for accelerate to save."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved state."""
        self.step, self.seconds = int(state["step"]), float(state["seconds"])

    def share(self, budget: Budget) -> float:
        """Return the share of the budget that is used, in [0, 1]."""
        used = [self.step / budget.steps] if budget.steps else []
        used += [self.seconds / 60 / budget.minutes] if budget.minutes else []
        return min(1.0, max(used))


class MovingAverage:
    """An exponential moving average of a module's parameters, with a short memory at first."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = deepcopy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take one step of the average towards `module`."""
        decay = min(self.decay, (step + 1) / (step + 10))
        averages: list[Tensor] = list(self.module.parameters())
        values: list[Tensor] = [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(averages, values, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages for accelerate to save."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from saved averages."""
        self.module.load_state_dict(state)


def learning_rate_factor(step: int, share: float, budget: Budget) -> float:
    """Return the factor of the learning rate: linear warm-up, constant, then a linear fall to zero."""
    warm = min(1.0, (step + 1) / budget.warmup_steps)
    return warm * min(1.0, (1 - share) / budget.decay_share)


def rates_of(optimizers: list[torch.optim.Optimizer]) -> list[list[float]]:
    """Return the learning rate of each group of each optimiser."""
    return [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]


def set_rates(optimizers: list[torch.optim.Optimizer], base: list[list[float]], factor: float) -> None:
    """Set each group's learning rate to its `base`, as `rates_of` returned it, times a factor."""
    for optimizer, rates in zip(optimizers, base, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor


def train(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss_of: Callable[[nn.Module, int], Mapping[str, Tensor]],
    *,
    folder: Path,
    budget: Budget,
    accelerator: Accelerator,
    ema_decay: float = 0.999,
    max_grad_norm: float = 1.0,
    on_save: Callable[[nn.Module, Progress], None] | None = None,
) -> nn.Module:
    """Train until the budget is used up and return the averaged model; resumes from `folder` where it can.

    `loss_of(model, step)` makes its own batch from the step's number alone, so that a killed run goes on exactly where
    it was last saved, and returns named scalars, "loss" among them. `on_save` sees the average at each save.
    """
    base_rates = rates_of(optimizers)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    average = MovingAverage(accelerator.unwrap_model(model), ema_decay)
    progress = Progress()
    accelerator.register_for_checkpointing(average, progress)
    state = folder / "state"
    if not state.exists() and replaced(state).exists() and accelerator.is_main_process:
        replaced(state).replace(state)  # killed between the two renames of a save
    accelerator.wait_for_everyone()
    if state.exists():
        accelerator.load_state(str(state))
        logger.info("resumed at step %d after %.1f minutes", progress.step, progress.seconds / 60)

    started, saved_at = time.monotonic() - progress.seconds, progress.seconds
    sums: dict[str, float] = {}
    while (share := progress.share(budget)) < 1:
        factor = learning_rate_factor(progress.step, share, budget)
        set_rates(optimizers, base_rates, factor)
        losses = loss_of(model, progress.step)
        accelerator.backward(losses["loss"])
        norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        if not math.isfinite(float(norm)):
            logger.warning("step %d: gradient is not finite; skipped", progress.step)
        else:
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        average.update(accelerator.unwrap_model(model), progress.step)
        progress.step += 1
        progress.seconds = shared_seconds(accelerator, time.monotonic() - started)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        if progress.step % budget.log_steps == 0 and accelerator.is_main_process:
            means = {name: total / budget.log_steps for name, total in sums.items()}
            log(
                folder,
                {"step": progress.step, "minutes": progress.seconds / 60, "lr": factor, "norm": float(norm), **means},
            )
            sums.clear()
        if progress.seconds - saved_at > 60 * budget.save_minutes:
            saved_at = progress.seconds
            save_state(accelerator, state)
            if on_save and accelerator.is_main_process:
                on_save(average.module, progress)
    save_state(accelerator, state)
    if on_save and accelerator.is_main_process:
        on_save(average.module, progress)
    return average.module


def shared_seconds(accelerator: Accelerator, seconds: float) -> float:
    """Return the main process's seconds in every process, so that all of them save and stop at the same step."""
    if accelerator.num_processes == 1:
        return seconds
    clock = torch.tensor([seconds], dtype=torch.float64, device=accelerator.device)
    return float(broadcast(clock).item())


def replaced(state: Path) -> Path:
    """Return where the state before this one lies."""
    return state.with_name("state.old")


def save_state(accelerator: Accelerator, state: Path) -> None:
    """Replace the saved state whole; a kill leaves the new one, the old one, or the old one where `replaced` says."""
    fresh, old = state.with_name("state.new"), replaced(state)
    if accelerator.is_main_process:
        shutil.rmtree(fresh, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(fresh))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(old, ignore_errors=True)
        if state.exists():
            state.replace(old)
        fresh.replace(state)


def log(folder: Path, record: Mapping[str, float]) -> None:
    """Append one line of JSON to the run's log."""
    rounded = {name: value if isinstance(value, int) else float(f"{value:.5g}") for name, value in record.items()}
    logger.info("%s", rounded)
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(rounded) + "\n")
