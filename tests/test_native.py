from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)

from tests.parity import TOLERANCE, difference, loaded, planned
from vgen import backbones
from vgen.backbones import Shot
from vgen.checkpoints import resolve
from vgen.errors import CheckpointError
from vgen.pipelines.text_to_video import generate
from vgen.runtime import choose, noise_generator

SIZE: dict[str, Any] = {"width": 48, "height": 32, "num_frames": 9}


def with_scheduler(folder: Path, scheduler: Any, target: Path) -> Path:
    """Copy a checkpoint to `target` with another scheduler."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / "scheduler")
    scheduler.save_pretrained(target / "scheduler")
    index = json.loads((target / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (target / "model_index.json").write_text(json.dumps(index))
    return target


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize(
    "scheduler",
    [
        None,
        UniPCMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW),
        FlowMatchHeunDiscreteScheduler(shift=3.0),
    ],
)
def test_the_checkpoints_own_scheduler_gives_the_latents_of_stock_diffusers(
    scheduler: Any, guidance_scale: float, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tiny_checkpoint if scheduler is None else with_scheduler(tiny_checkpoint, scheduler, tmp_path / "model")
    settings = {**SIZE, "num_inference_steps": 6, "guidance_scale": guidance_scale}
    made = planned(folder, "a red ball", seed=7, sampler="native", **settings)
    backbone = loaded(folder)
    latents = generate(made, backbone).latents
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline("a red ball", generator=noise_generator(7), output_type="latent", **settings).frames
    assert difference(latents, expected) <= TOLERANCE
    # Neither run left a trace in the scheduler for the next one.
    assert torch.equal(generate(made, backbone).latents, latents)
    euler = generate(planned(folder, "a red ball", seed=7, sampler="euler", **settings), backbone).latents
    assert (difference(latents, euler) == 0) == (scheduler is None)


def test_a_scheduler_of_another_kind_of_model_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_scheduler(
        tiny_checkpoint, DPMSolverMultistepScheduler(prediction_type="epsilon"), tmp_path / "model"
    )
    shot = Shot(**SIZE, fps=16, generator=noise_generator(0))
    with pytest.raises(CheckpointError, match=r'DPMSolverMultistepScheduler of .* is set to "epsilon"') as caught:
        loaded(folder).native_scheduler(4, shot)
    assert caught.value.tip is not None and "--sampler euler" in caught.value.tip


@pytest.mark.parametrize("scheduler", [UniPCMultistepScheduler(**FLOW), FlowMatchHeunDiscreteScheduler(shift=3.0)])
def test_the_shift_that_a_checkpoint_is_recommended_takes_the_place_of_its_schedulers(
    scheduler: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = resolve(str(with_scheduler(tiny_checkpoint, scheduler, tmp_path / "model")))
    shifted = replace(checkpoint, defaults=replace(checkpoint.defaults, shift=7.0))
    shot = Shot(**SIZE, fps=16, generator=noise_generator(0))
    own, other = (backbones.load(which, choose("cpu", "float32")).sigmas(4, shot) for which in (checkpoint, shifted))
    # Some space the timesteps down to their last one, which is shifted, too: not exactly, and least at the end.
    expected = 7 / 3 * own / (1 + (7 / 3 - 1) * own)
    assert other[:4] == pytest.approx(expected[:4], abs=5e-3)
    assert (other - own)[1:-1].min() > 0.02
