from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests import tiny_ltx_video
from tests.parity import TOLERANCE, difference, loaded, planned
from vgen import backbones, cli, offloading, performance
from vgen.backbones import components, footprint
from vgen.checkpoints import Peak, resolve
from vgen.errors import UsageError
from vgen.pipelines import text_to_video
from vgen.runtime import Memory, Runtime

SIZE: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 9, "num_inference_steps": 2, "seed": 1}
GB = 10**9


def settled(model: str, gpu_gb: float | None, *, main_gb: float = 256, **values: Any) -> performance.Settings:
    checkpoint = replace(resolve(model), peak=values.pop("peak", Peak()))
    gpu = None if gpu_gb is None else Memory(device="cuda:0", total=int(gpu_gb * GB), free=int(gpu_gb * GB))
    main = Memory(device="cpu", total=int(main_gb * GB), free=int(main_gb * GB))
    return performance.settle(checkpoint, gpu_memory=lambda device: gpu, main_memory=lambda: main, **values)


# Wan 2.1 14B has 40.4 GB of weights in bfloat16, of which 28.6 are the transformer's.
@pytest.mark.parametrize(
    ("gpu_gb", "values", "offload"),
    [
        (80, {}, "none"),
        (50, {}, "model"),
        (50, {"performance": "speed"}, "none"),
        (50, {"dtype": "float32"}, "group"),
        (50, {"peak": Peak(whole=45, offload=30)}, "none"),
        (32, {"peak": Peak(offload=35)}, "group"),
        (24, {}, "group"),
        (24, {"offload": "none"}, "none"),
        (80, {"offload": "model"}, "model"),
        (80, {"performance": "memory"}, "group"),
        (80, {"performance": "memory", "offload": "none"}, "none"),
        (None, {}, "none"),
    ],
)
def test_offloading_follows_from_what_is_needed_and_free(
    gpu_gb: float | None, values: dict[str, Any], offload: str
) -> None:
    settings = settled("wan2.1-14b", gpu_gb, **values)
    assert settings.offload == offload
    if gpu_gb is not None and values.get("offload") is None:
        assert "cuda:0" in settings.notes[0]


def test_a_small_model_asks_no_gpu() -> None:
    def asked(device: str) -> Memory:
        raise AssertionError("asked")

    settings = performance.settle(resolve("toyland"), gpu_memory=asked)
    assert (settings.offload, settings.tiling, settings.compile, settings.notes) == ("none", False, False, ())


def test_weights_that_are_not_here_yet_are_not_guessed() -> None:
    checkpoint = replace(resolve("wan2.1-14b"), components=(), folder=None)
    memory = Memory(device="cuda:0", total=80 * GB, free=80 * GB)
    assert performance.settle(checkpoint, gpu_memory=lambda device: memory).offload is None
    assert performance.settle(checkpoint, gpu_memory=lambda device: None).offload == "none"


def test_performance_chooses_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    saving = settled("wan2.1-14b", 24, performance="memory")
    assert (saving.tiling, saving.compile, saving.dtype) == (True, False, "bfloat16")
    assert settled("wan2.1-14b", 24, performance="memory", dtype="float32").dtype == "float32"
    assert settled("wan2.1-14b", 80, performance="speed").compile
    assert not settled("wan2.1-14b", 80, performance="speed", compiled=False).compile
    assert not settled("wan2.1-14b", None, performance="speed").compile
    assert "main memory are free" in settled("wan2.1-14b", None, main_gb=16).notes[0]

    monkeypatch.setenv("CXX", "no-such-compiler")
    assert 'no "no-such-compiler"' in " ".join(settled("wan2.1-14b", 80, performance="speed").notes)
    with pytest.raises(UsageError, match="no-such-compiler"):
        settled("wan2.1-14b", 80, compiled=True)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"offload": "model"}, "there is no such GPU here"),
        ({"offload": "group", "device": "cpu"}, '"cpu" uses the main memory alone'),
        ({"offload": "modle"}, 'Did you mean "model"'),
        ({"performance": "sped"}, 'Did you mean "speed"'),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        settled("toyland", None, **values)


def test_weights_of_a_folder_are_counted_in_the_headers(tiny_checkpoint: Path) -> None:
    backbone, checkpoint = loaded(tiny_checkpoint), resolve(str(tiny_checkpoint))
    counted = {part.name: part.parameters for part in checkpoint.components}
    models = components.models_of(backbone)
    assert counted.keys() == models.keys()
    for name, model in models.items():
        tensors = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}  # tied ones once
        assert counted[name] == sum(tensors.values())


@pytest.fixture(scope="module", params=["wan", "ltx-video"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "wan":
        return request.getfixturevalue("tiny_checkpoint")  # type: ignore[no-any-return]
    return tiny_ltx_video.build(tmp_path_factory.mktemp("checkpoints") / "ltx")


def test_offloading_and_tiling_and_compiling_leave_the_latents(folder: Path, tmp_path: Path) -> None:
    plan = planned(folder, "a red ball", **SIZE)
    latents = text_to_video.generate(plan, loaded(folder)).latents

    by_model = backbones.load(resolve(str(folder)), Runtime(device="cpu", dtype="float32", offload="model"))
    assert torch.equal(text_to_video.generate(plan, by_model).latents, latents)
    offloading.rest(by_model)
    assert all(hasattr(model, "_hf_hook") for model in components.models_of(by_model).values())

    by_group = backbones.load(resolve(str(folder)), Runtime(device="cpu", dtype="float32", offload="group"))
    assert torch.equal(text_to_video.generate(plan, by_group).latents, latents)

    # Between the CPU and itself nothing moves; to the disk and back, weights do.
    from_disk = loaded(folder)
    offloading.by_blocks(from_disk.transformer, "cpu", offload_to_disk_path=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == len(from_disk.blocks()) + 1
    # Those that are mapped from files lie at other addresses, so that sums may be rounded otherwise.
    assert difference(text_to_video.generate(plan, from_disk).latents, latents) <= TOLERANCE

    tiled = backbones.load(resolve(str(folder)), Runtime(device="cpu", dtype="float32", tiling=True))
    assert tiled.vae.use_tiling  # type: ignore[attr-defined]
    assert torch.equal(text_to_video.generate(plan, tiled).latents, latents)


def test_compiled_blocks_agree_and_take_a_cache_and_offloading(tiny_checkpoint: Path) -> None:
    plan = planned(tiny_checkpoint, "a red ball", **{**SIZE, "num_inference_steps": 4})
    latents = text_to_video.generate(plan, loaded(tiny_checkpoint)).latents
    runtime = Runtime(device="cpu", dtype="float32", compile=True, offload="group")
    torch._dynamo.utils.counters.clear()
    compiled = backbones.load(resolve(str(tiny_checkpoint)), runtime)
    made = text_to_video.generate(plan, compiled)
    # Both blocks are one piece of code.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert difference(made.latents, latents) <= TOLERANCE
    cached = text_to_video.generate(replace(plan, cache="first-block:threshold=0.9"), compiled)
    assert cached.skipped is not None
    assert cached.skipped.skipped > 0


def test_memory_of_a_computation_is_known_before_it_is_done(tiny_checkpoint: Path) -> None:
    vae = loaded(tiny_checkpoint).vae
    latents = torch.randn(1, 16, 3, 8, 8)
    with torch.inference_mode():
        expected = footprint.peak_bytes(lambda: vae.decode(latents))
        with footprint.Held() as held:
            pixels = vae.decode(latents, return_dict=False)[0]
    assert expected == held.peak > 2 * pixels.nbytes
    assert held.bytes == pixels.nbytes


def test_a_video_that_would_not_fit_is_decoded_in_tiles(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = loaded(tiny_checkpoint).vae
    latents = torch.randn(1, 16, 3, 8, 8)
    with torch.inference_mode():
        needed = footprint.peak_bytes(lambda: vae.decode(latents))
        for free, is_tiled in ((needed, False), (needed - 1, True)):
            memory = Memory(device="cpu", total=free, free=free)
            monkeypatch.setattr(components.runtime, "memory", lambda device, memory=memory: memory)
            assert components.decode_or_tile(vae, latents).shape == (1, 3, 9, 64, 64)
            assert vae.use_tiling == is_tiled


def test_running_out_of_memory_says_where_and_keeps_the_latents(tmp_path: Path) -> None:
    """A real allocation fails: when a second decoding is left 4 MiB.

    The first one sets up all kernels: where memory is too little for that, oneDNN words it as it words any failure.
    """
    script = textwrap.dedent(
        """
        import resource
        from pathlib import Path
        from vgen.backbones.wan import Wan

        decode = Wan.decode

        def with_little_memory(self, latents, shot=None):
            decode(self, latents, shot)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**22, resource.RLIM_INFINITY))
            try:
                return decode(self, latents, shot)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        Wan.decode = with_little_memory
        from vgen.cli import main
        main()
        """
    )
    arguments = ["generate", "a red ball", "--frames", "5", "--steps", "1", "--device", "cpu", "-o", "clip.gif"]
    arguments += ["--width", "256", "--height", "256"]
    command = [sys.executable, "-c", script, *arguments]
    # What the first decoding frees goes back to the system.
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    assert "The memory ran out while decoding: main memory has" in run.stderr
    assert "vgen decode clip.gif.latents.safetensors --performance memory" in run.stderr
    assert (tmp_path / "clip.gif.latents.safetensors").is_file()


def test_what_was_chosen_is_in_the_plan_and_in_the_manifest(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["generate", "a red ball", "--model", str(tiny_checkpoint), "--device", "cpu", "--format", "json"]
    arguments += ["--width", "64", "--height", "64", "--frames", "9", "--steps", "4", "-o", "clip.gif"]
    arguments += ["--performance", "memory", "--dtype", "float32", "--cache", "first-block:threshold=0.9"]
    dry = CliRunner().invoke(cli.app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    (plan,) = json.loads(dry.stdout)["plans"]
    assert plan["cache"] == "first-block:threshold=0.9"
    assert plan["chosen"]["tiling"] is True
    assert "decoded in tiles" in dry.stderr

    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    manifest = json.loads(Path("clip.gif.json").read_text())
    assert manifest["performance"]["tiling"] is True
    assert manifest["performance"]["cache"]["calls"] == 2 * 2 * 4
    assert manifest["performance"]["cache"]["skipped"] > 0
    assert manifest["request"]["cache"] == "first-block:threshold=0.9"
