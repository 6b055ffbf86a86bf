"""Few-step students: what is published of how they are stepped, on tiny random checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file, save_file

from tests import tiny_lora, tiny_wan_image
from tests.parity import TOLERANCE, difference, loaded, planned
from vgen import backbones, checkpoints
from vgen.backbones import Shot
from vgen.errors import CheckpointError
from vgen.pipelines.text_to_video import generate
from vgen.runtime import choose, noise_generator
from vgen.sampling.euler import euler
from vgen.sampling.schedule import at_timesteps

SIZE: dict[str, Any] = {"width": 48, "height": 32, "num_frames": 5}
PROMPT = "a red ball"


@pytest.fixture
def student(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a checkpoint that says of itself what FastVideo's students do."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "student"))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "WanDMDPipeline", "scheduler": ["diffusers", "UniPCMultistepScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "scheduler")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    UniPCMultistepScheduler(**flow).save_pretrained(folder / "scheduler")
    return folder


@torch.no_grad()
def test_a_student_of_fastvideo_is_stepped_as_there(student: Path, tiny_checkpoint: Path) -> None:
    made = planned(student, PROMPT, seed=7, **SIZE)
    assert (made.num_inference_steps, made.guidance_scale, made.sampler) == (3, 1.0, "lcm:grid_shift=8")
    backbone = loaded(student)
    seen: list[float] = []
    backbone.transformer.register_forward_pre_hook(
        lambda module, arguments, values: seen.append(values["timestep"].item()), with_kwargs=True
    )
    latents = generate(made, backbone).latents
    # The model is told whole timesteps, and the noise is that of the schedule which they were rounded from.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=8.0)
    pipeline = WanPipeline.from_pretrained(tiny_checkpoint)
    text, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=512)
    generator = noise_generator(7)
    expected = torch.randn((1, 16, 2, 4, 6), generator=generator)
    timesteps = (1000, 757, 522)
    for i, timestep in enumerate(timesteps):
        flow = pipeline.transformer(expected, torch.tensor([timestep]), text, return_dict=False)[0]
        sigma = scheduler.sigmas[(scheduler.timesteps - timestep).abs().argmin()]
        expected = expected - sigma * flow
        if i < 2:
            near = scheduler.timesteps[(scheduler.timesteps - timesteps[i + 1]).abs().argmin()]
            noise = torch.randn(expected.shape, generator=generator)
            expected = scheduler.scale_noise(expected, near[None], noise)
    assert difference(latents, expected) <= TOLERANCE
    assert seen == pytest.approx(timesteps, abs=1e-3)
    assert torch.equal(generate(made, backbone).latents, latents)


def test_sparse_attention_that_a_student_learned_with_is_not_left_out_in_silence(student: Path) -> None:
    weights = student / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(weights), "blocks.0.to_gate_compress.weight": torch.zeros(24, 24)}, weights)
    with pytest.raises(CheckpointError, match=r"was trained with sparse attention \(VSA\), which vgen lacks"):
        loaded(student)
    with pytest.raises(CheckpointError, match="it lacks the sparse attention that it was trained with, vsa"):
        backbones.require_runnable(checkpoints.resolve("fastwan2.1-1.3b"))


def test_the_four_steps_of_wan_2_2_are_euler_steps_and_each_transformer_makes_two(tmp_path: Path) -> None:
    """As LightX2V's `Wan22StepDistillScheduler`, which takes the second transformer from the third step on."""
    folder = tiny_wan_image.build(tmp_path / "model", encoder=False, boundary=0.9)
    tensors = tiny_lora.wan(folder)
    texts = [f"{which}={tiny_lora.save(tmp_path / f'{which}.safetensors', tensors)}" for which in ("high", "low")]
    checkpoint = checkpoints.resolve(str(folder))
    preset = checkpoints.resolve("wan2.2-14b-4step").defaults
    with_loras = checkpoints.replace(
        checkpoint, defaults=preset, loras=checkpoints.loras.asked(texts, two_transformers=True)
    )
    backbone: Any = backbones.load(with_loras, choose("cpu", "float32"))
    sigmas = at_timesteps(preset.timesteps, preset.shift)
    assert [backbone.is_below_boundary(sigma) for sigma in sigmas[:-1]] == [False, False, True, True]
    shot = Shot(**SIZE, fps=16, generator=noise_generator(0))
    noise = backbone.noise(shot)
    flows = [torch.randn(noise.shape, generator=noise_generator(i)) for i in range(4)]
    left = list(flows)
    expected = noise
    for i, flow in enumerate(flows):
        data = expected - sigmas[i] * flow
        expected = data + sigmas[i + 1] * flow if i < 3 else data
    assert difference(euler(lambda latents, sigma: left.pop(0), noise, sigmas), expected) <= TOLERANCE
