"""Sparse attention in real models of every family, and what a run tells of it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny_cogvideox, tiny_hunyuan_video, tiny_hunyuan_video_15, tiny_ltx_2, tiny_ltx_video
from tests.parity import loaded
from vgen import attention
from vgen import latents as kept
from vgen.attention.sparse import HOOK, SparseAttention
from vgen.checkpoints import resolve
from vgen.errors import UsageError, VgenError
from vgen.pipelines import text_to_video
from vgen.plan import Plan, plan
from vgen.request import GenerateRequest

SIZE: dict[str, Any] = {"width": 64, "height": 32, "num_frames": 17, "num_inference_steps": 5}
WHOLE = "tile:global=99,kernel=reference,block=16"
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "cogvideox": tiny_cogvideox.build,
    "hunyuan-video": tiny_hunyuan_video.build,
    "hunyuan-video-1.5": tiny_hunyuan_video_15.build,
    "ltx-video": tiny_ltx_video.build,
    "ltx-2": tiny_ltx_2.build,
}


def planned(folder: Path, asked: str | None, **changes: Any) -> Plan:
    values = {**SIZE, "model": str(folder), "prompt": "a red ball", "seed": 7, "sampler": "euler", **changes}
    return plan(GenerateRequest(**values, attention=asked), resolve(str(folder)))


def made(folder: Path, backbone: Any, asked: str | None, **changes: Any) -> text_to_video.Generation:
    return text_to_video.generate(planned(folder, asked, **changes), backbone)


def differ(one: text_to_video.Generation, other: text_to_video.Generation) -> float:
    return (one.latents - other.latents).abs().max().item()


def test_sparse_attention_at_density_1_gives_the_same_video_and_at_less_another(tiny_checkpoint: Path) -> None:
    backbone = loaded(tiny_checkpoint)
    dense = made(tiny_checkpoint, backbone, None, guidance_scale=4.0)
    assert dense.attention is None
    whole = made(tiny_checkpoint, backbone, "tile:global=5,kernel=gather,block=16", guidance_scale=4.0)
    assert differ(dense, whole) <= 1e-5
    assert whole.attention is not None and whole.attention["sparsity"] == 0
    sparse = made(tiny_checkpoint, backbone, "tile:global=1,kernel=gather,block=16", guidance_scale=4.0)
    assert differ(dense, sparse) > 1e-4
    again = made(tiny_checkpoint, backbone, None, guidance_scale=4.0)
    assert torch.equal(dense.latents, again.latents)  # nothing is left behind
    assert sparse.attention is not None
    assert sparse.attention["sparsity"] == pytest.approx(4 * 3 / 25, abs=1e-4)
    assert sparse.attention["layers"] == [pytest.approx(4 * 3 / 25, abs=1e-4)] * 2
    assert sparse.attention["calls"] == sparse.attention["sparse_calls"] == 5 * 2 * 2  # steps, layers, branches
    assert sparse.attention["options"]["global"] == 1 and sparse.attention["kernel"] == "gather"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_every_pattern(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "tiny")
    backbone = loaded(folder)
    num_frames = min(17, resolve(str(folder)).rules.max_frames)
    size = {"width": 96, "height": 64, "num_frames": num_frames, "num_inference_steps": 2}
    dense = made(folder, backbone, None, **size)
    grid = backbone.token_grid(num_frames, 64, 96)
    whole = made(folder, backbone, f"tile:global={grid[0]},kernel=gather,block=16", **size)
    assert differ(dense, whole) <= 1e-4 * dense.latents.abs().max().item()
    sparse = made(folder, backbone, "tile:global=0,kernel=gather,block=16", **size)
    assert sparse.attention is not None and sparse.attention["sparse_calls"] == sparse.attention["calls"] > 0
    assert 0 < sparse.attention["sparsity"] < 1
    adaptive = made(folder, backbone, "adaspa:kernel=gather,block=16,warmup=0,search=0", **size)
    assert adaptive.attention is not None and 2 * adaptive.attention["sparse_calls"] == adaptive.attention["calls"]


def test_each_branch_of_guidance_has_a_memory_of_its_own(tiny_checkpoint: Path) -> None:
    backbone = loaded(tiny_checkpoint)
    asked = planned(tiny_checkpoint, "adaspa:kernel=gather,block=16,warmup=0,search=0", guidance_scale=4.0)
    sparse = text_to_video.sparse_attention(asked, backbone)
    assert sparse is not None
    text_to_video.generate(asked, backbone, sparse=sparse)
    assert set(sparse._memories) == set(itertools.product(range(2), range(2)))
    one, other = (sparse._memories[0, branch]["lse"] for branch in (0, 1))
    assert (one - other).abs().max() >= 0  # of the same shape
    assert sparse.account.calls == 5 * 2 * 2 and sparse.account.sparse_calls == 4 * 2 * 2
    # A second run begins anew: the same video, not one that goes on with the masks of the first.
    assert differ(text_to_video.generate(asked, backbone), text_to_video.generate(asked, backbone)) == 0


def test_known_frames_and_windows_go_with_sparse_attention(tiny_expanded: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 32), "red").save(tmp_path / "first.png")
    backbone = loaded(tiny_expanded)
    image = {"image": tmp_path / "first.png"}
    dense = made(tiny_expanded, backbone, None, **image)
    whole = made(tiny_expanded, backbone, "tile:global=5,kernel=gather,block=16", **image)
    assert differ(dense, whole) <= 1e-5
    sparse = made(tiny_expanded, backbone, "adaspa:kernel=gather,block=16,warmup=0", **image)
    assert torch.equal(sparse.latents[:, :, :1], dense.latents[:, :, :1])  # what is known stays


def test_a_cache_goes_with_sparse_attention(tiny_checkpoint: Path) -> None:
    backbone = loaded(tiny_checkpoint)
    asked = "adaspa:kernel=gather,block=16,warmup=0,search=0+0.6"
    both = made(tiny_checkpoint, backbone, asked, cache="first-block:threshold=0.9", num_inference_steps=8)
    assert both.skipped is not None and both.skipped.skipped > 0
    assert both.attention is not None
    assert 0 < both.attention["sparse_calls"] < both.attention["calls"] < 8 * 2 * 2  # what was skipped did not attend
    alone = made(tiny_checkpoint, backbone, asked, num_inference_steps=8)
    assert alone.attention is not None and alone.attention["calls"] == 8 * 2 * 2


def test_a_cache_of_attention_goes_with_sparse_attention(tiny_checkpoint: Path) -> None:
    backbone = loaded(tiny_checkpoint)
    asked = "tile:global=1,kernel=gather,block=16"
    both = made(tiny_checkpoint, backbone, asked, cache="taylorseer:interval=3", num_inference_steps=8)
    assert both.skipped is not None and 0 < both.skipped.skipped < both.skipped.calls
    assert both.attention is not None and 0 < both.attention["sparse_calls"] < 8 * 2 * 2
    assert both.attention["sparsity"] == pytest.approx(4 * 3 / 25, abs=1e-4)


def test_values_that_are_carried_over_go_through_sparse_attention(tiny_checkpoint: Path) -> None:
    """Feature sharing changes V at its projection, before any pattern, so that the two are neutral to each other."""
    from vgen.editing.sharing import sites

    backbone = loaded(tiny_checkpoint)
    whole = "tile:global=5,kernel=gather,block=16"
    plain = made(tiny_checkpoint, backbone, whole)
    projections = sites(backbone, 0.5, 1.0)
    assert projections
    hooks = [found.register_forward_hook(lambda module, inputs, v: v.flip(1)) for found in projections.values()]
    try:
        dense, carried = made(tiny_checkpoint, backbone, None), made(tiny_checkpoint, backbone, whole)
    finally:
        for hook in hooks:
            hook.remove()
    assert differ(dense, carried) <= 1e-5 and differ(carried, plain) > 1e-4


def test_two_processes_that_share_heads_make_the_same_video(tiny_checkpoint: Path, tmp_path: Path) -> None:
    asked = "adaspa:kernel=gather,block=16,warmup=0"

    def latents(*more: str) -> Tensor:
        path = tmp_path / f"{len(more)}.mp4"
        command = [
            sys.executable,
            "-m",
            "vgen",
            "generate",
            "a red ball",
            "--model",
            str(tiny_checkpoint),
            "--seed",
            "7",
        ]
        size = ["--width", "64", "--height", "32", "--frames", "17", "--steps", "4", "--dtype", "float32"]
        command += [*size, "--device", "cpu", "--attention", asked, "--keep-latents", "-o", str(path), *more]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert done.returncode == 0, done.stderr
        return kept.load(path.with_name(f"{path.name}.latents.safetensors"))[0]

    assert (latents() - latents("--gpus", "2")).abs().max().item() <= 1e-4


def test_recall_is_measured_at_steps_and_not_counted_as_time(tiny_checkpoint: Path) -> None:
    backbone = loaded(tiny_checkpoint)
    asked = planned(tiny_checkpoint, "tile:global=1,kernel=gather,block=16")
    sparse = text_to_video.sparse_attention(asked, backbone)
    assert sparse is not None
    sparse.measured_steps = frozenset({1, 3})
    text_to_video.generate(asked, backbone, sparse=sparse)
    assert {layer: len(found) for layer, found in sparse.account.recalls.items()} == {0: 2 * 2, 1: 2 * 2}
    # Random weights attend nearly evenly, so that a mask recalls about what it keeps.
    assert all(abs(found - (1 - 12 / 25)) < 0.2 for found in sparse.account.recalls[0])
    assert sparse.account.measuring > 0 and sparse.account.seconds > 0


def test_a_part_of_the_tokens_is_refused(tiny_checkpoint: Path) -> None:
    backbone = loaded(tiny_checkpoint)
    sparse = SparseAttention(attention.parse("dense"), backbone, (5, 2, 4))
    q = torch.randn(1, 2, 20, 12)
    with pytest.raises(VgenError, match="expects 40 video tokens at once, but this attention has 20 queries"):
        sparse._attend(0, q, q, q)


def test_a_slot_that_does_not_call_torch_is_an_error_and_the_model_is_left_as_it_was(tiny_checkpoint: Path) -> None:
    backbone = loaded(tiny_checkpoint)

    def nothing(module: Any, hidden_states: Tensor, *others: Any) -> Tensor:
        return hidden_states

    processor = backbone.attention_slots()[1].processor
    backbone.attention_slots()[1].set_processor(nothing)
    with pytest.raises(VgenError, match="layer 1 called torch's attention 0 times"):
        made(tiny_checkpoint, backbone, "dense")
    backbone.attention_slots()[1].set_processor(processor)
    assert all(HOOK not in slot._diffusers_hook.hooks for slot in backbone.attention_slots())
    made(tiny_checkpoint, backbone, "dense")


def test_patterns_are_checked_against_the_video_and_the_machine(tiny_checkpoint: Path) -> None:
    backbone = loaded(tiny_checkpoint)
    with pytest.raises(UsageError, match="99 global frames are more than the 5 latent frames"):
        made(tiny_checkpoint, backbone, "tile:global=99")
    with pytest.raises(UsageError, match='no attention "til"'):
        planned(tiny_checkpoint, "til")


def test_the_request_and_the_manifest_tell_the_attention(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from datetime import datetime

    from vgen import manifest
    from vgen.runtime import choose

    asked = planned(tiny_checkpoint, "tile:global=1")
    did = {"pattern": "tile", "kernel": "gather"}
    built = manifest.build(
        asked, choose("cpu", "float32"), checkpoint={}, timings={}, created=datetime.now(), attention=did
    )
    assert json.loads(json.dumps(built))["attention"] == did
    assert manifest.request(built, {}).attention == "tile:global=1"
    assert replace(asked, attention=None).to_dict()["attention"] is None
