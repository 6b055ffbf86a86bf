"""Several processes make the video that one makes: really several, on the CPU, over gloo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models import attention_dispatch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, distributed, multiprocessing
from typer.testing import CliRunner

from tests import tiny_ltx_video, tiny_wan_image
from tests.parity import TOLERANCE, difference, loaded, planned
from vgen import cli, context_parallel, manifest, video
from vgen import latents as kept
from vgen.pipelines.text_to_video import generate

ROOT = Path(__file__).parent.parent
NUM_RANKS = 2
SMALL: dict[str, Any] = {"num_frames": 9, "num_inference_steps": 2, "guidance_scale": 3.0, "seed": 7}
PROMPT = "a red ball jumps"

# What is made -> the family's folder, how, and the request. 3 x 3 x 5 tokens cannot be halved; 3 x 2 x 2 can.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ring": ("wan", "ring", {"width": 32, "height": 32, **SMALL}),
    "ring, uneven, from an image": ("wan", "ring", {"width": 80, "height": 48, "image": True, **SMALL}),
    "ulysses, uneven": ("wan", "ulysses", {"width": 80, "height": 48, **SMALL}),
    "two images, by an encoder": ("wan-image", "ulysses", {"width": 32, "height": 32, "image": True, **SMALL}),
    "two transformers": ("wan-two", "ulysses", {"width": 32, "height": 32, "image": True, **SMALL}),
    "text with a mask": ("ltx", "ulysses", {"width": 64, "height": 64, "image": True, **SMALL}),
    "text with a mask, ring": ("ltx", "ring", {"width": 96, "height": 96, **SMALL}),
}


def _flash_on_the_cpu(
    ctx: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """Return attention and its log-sum-exp by the CPU's kernel: what the GPU's, which a ring needs, would."""
    heads = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _rank(rank: int, folders: dict[str, Path], image: Path, store: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=NUM_RANKS)
    attention_dispatch._native_flash_attention_forward_op = _flash_on_the_cpu
    for name, (family, method, request) in CASES.items():
        plan = _planned(folders[family], image, request)
        backbone = loaded(folders[family])
        shared = context_parallel.attach(backbone, method)
        shared.fit(plan.num_frames, plan.height, plan.width)
        latents = generate(plan, backbone).latents
        assert shared.lengths[0] >= shared.lengths[1] > 0
        kept.save(store.parent / f"{name}.{rank}.safetensors", latents, plan)
    distributed.destroy_process_group()


def _planned(folder: Path, image: Path, request: dict[str, Any]) -> Any:
    return planned(folder, PROMPT, **{**request, "image": image if request.get("image") else None})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_expanded: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {
        "wan": tiny_expanded,
        "wan-image": tiny_wan_image.build(root / "wan-image"),
        "wan-two": tiny_wan_image.build(root / "wan-two", encoder=False, boundary=0.9),
        "ltx": tiny_ltx_video.build(root / "ltx"),
    }


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "first.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the latents of every case and rank are, made once by two processes."""
    folder = tmp_path_factory.mktemp("made")
    multiprocessing.spawn(_rank, (folders, image, folder / "store"), nprocs=NUM_RANKS)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_ranks_make_the_latents_of_one_process(name: str, folders: dict[str, Path], image: Path, made: Path) -> None:
    family, _, request = CASES[name]
    expected = generate(_planned(folders[family], image, request), loaded(folders[family])).latents
    for rank in range(NUM_RANKS):
        latents, _ = kept.load(made / f"{name}.{rank}.safetensors")
        assert difference(latents, expected) <= TOLERANCE


def vgen(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "vgen", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_the_command_line_makes_one_video_with_two_processes(tiny_expanded: Path, image: Path, tmp_path: Path) -> None:
    small = ("--width", "32", "--height", "32", "--frames", "9", "--steps", "2", "--dtype", "float32", "--seed", "7")
    asked = (PROMPT, "--model", str(tiny_expanded), "--image", str(image), *small, "--guidance-scale", "3")
    done = vgen(
        tmp_path,
        "generate",
        *asked,
        "--device",
        "cpu",
        "--gpus",
        "2",
        "-o",
        "a.mp4",
        "--keep-latents",
        "--format",
        "json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"] == ["a.mp4"]
    said = ["Loading the model ...", "Reading the prompt ...", "Denoising ...", "Decoding ...", "Writing ..."]
    assert done.stderr.splitlines() == said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.mp4.json", "a.mp4.latents.safetensors"]
    latents, request = kept.load(tmp_path / "a.mp4.latents.safetensors")
    one = planned(tiny_expanded, PROMPT, image=image, width=32, height=32, **SMALL)
    assert difference(latents, generate(one, loaded(tiny_expanded)).latents) <= TOLERANCE
    assert (request.gpus, request.context_parallel) == (2, "ulysses")
    written = manifest.read(tmp_path / "a.mp4")["request"]
    assert (written["gpus"], written["context_parallel"]) == (2, "ulysses")


def test_what_stops_both_processes_is_told_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 3}), encoding="utf-8")
    done = vgen(tmp_path, "generate", PROMPT, "--model", "model", "--device", "cpu", "--gpus", "2", "-o", "a.mp4")
    assert (done.returncode, done.stdout) == (1, "")
    (error,) = [line for line in done.stderr.splitlines() if "Error" in line]
    assert error.startswith("Error: ")
    assert "transformer" in error
    assert "Traceback" not in done.stderr


def test_more_gpus_than_there_are_is_an_error_that_names_both(tmp_path: Path) -> None:
    asked = ["generate", PROMPT, "--gpus", "64", "--context-parallel", "ring", "-o", str(tmp_path / "a.mp4")]
    result = CliRunner().invoke(cli.app, asked)
    assert result.exit_code == 2
    assert f"asks for 64 CUDA GPUs, and torch sees {torch.cuda.device_count()}." in result.stderr


def test_an_edit_with_features_is_shared_by_two_processes(tiny_expanded: Path, image: Path, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), np.uint8)
    video.save(frames, tmp_path / "clip.png", fps=8)
    asked = ("edit", "clip.png", "--source", "a red ball", "--target", "a blue cube", "--model", str(tiny_expanded))
    asked += ("--method", "rf-solver", "--inject", "1", "--steps", "2", "--dtype", "float32", "--seed", "7")
    asked += ("--width", "32", "--height", "32", "--device", "cpu", "--keep-latents", "--format", "json")
    made = {}
    for name, options in {"one": (), "two": ("--gpus", "2")}.items():
        done = vgen(tmp_path, *asked, *options, "-o", f"{name}.png")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["measures"]["store_hit_rate"] == 1
        made[name] = load_file(tmp_path / f"{name}.png.latents.safetensors")["latents"]
    assert difference(made["two"], made["one"]) <= TOLERANCE
    assert manifest.read(tmp_path / "two.png")["request"]["gpus"] == 2
