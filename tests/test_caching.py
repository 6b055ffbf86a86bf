from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import tiny_ltx_video
from tests.parity import loaded, planned
from vgen import caching
from vgen.backbones import Backbone
from vgen.backbones.components import transformers_of
from vgen.checkpoints import resolve
from vgen.errors import UsageError
from vgen.pipelines import text_to_video
from vgen.pipelines.text_to_video import Generation

STEPS = 8
SIZE: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 9, "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def tiny_ltx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ltx_video.build(tmp_path_factory.mktemp("checkpoints") / "ltx")


@pytest.fixture(scope="module", params=["wan", "ltx-video"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue({"wan": "tiny_expanded", "ltx-video": "tiny_ltx"}[request.param])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return loaded(folder)  # type: ignore[no-any-return]


def made(folder: Path, backbone: Backbone, *, seed: int = 1, **values: Any) -> Generation:
    return text_to_video.generate(planned(folder, "a red ball", seed=seed, **{**SIZE, **values}), backbone)


def test_a_cache_skips_work_and_leaves_nothing_behind(folder: Path, backbone: Backbone) -> None:
    plain = made(folder, backbone)
    assert plain.skipped is None
    (transformer,) = transformers_of(backbone)
    passes = 2 * STEPS  # with and without the prompt
    for cache, calls in (("first-block:threshold=0.9", 2), ("taylorseer:interval=4", 4)):
        cached = made(folder, backbone, cache=cache)
        assert cached.skipped is not None
        assert cached.skipped.calls == calls * passes
        assert 0 < cached.skipped.skipped < cached.skipped.calls
        assert not torch.equal(cached.latents, plain.latents)
    assert not transformer.is_cache_enabled
    assert not any("forward" in vars(block.attn1) for block in transformer.modules() if hasattr(block, "attn1"))
    assert torch.equal(made(folder, backbone).latents, plain.latents)


def test_the_setting_that_skips_nothing_changes_nothing(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    plain = made(folder, backbone)
    ratios = tmp_path / "ratios.json"
    ratios.write_text("[1.0, 1.0]")
    for cache in ("first-block:threshold=0", "taylorseer:interval=1", f"magcache:ratios={ratios},threshold=0"):
        cached = made(folder, backbone, cache=cache)
        assert cached.skipped is not None
        assert cached.skipped.skipped == 0
        assert torch.equal(cached.latents, plain.latents)


def test_the_second_video_of_a_batch_is_the_one_made_alone(folder: Path, backbone: Backbone) -> None:
    cache = "first-block:threshold=0.9"
    made(folder, backbone, seed=1, cache=cache)
    second = made(folder, backbone, seed=2, cache=cache)
    alone = made(folder, loaded(folder), seed=2, cache=cache)
    assert torch.equal(second.latents, alone.latents)
    assert second.skipped == alone.skipped


def test_an_error_while_denoising_takes_the_cache_off(tiny_expanded: Path) -> None:
    backbone = loaded(tiny_expanded)

    def fail(step: int, num_steps: int) -> None:
        raise RuntimeError("stop")

    plan = planned(tiny_expanded, "a red ball", seed=1, cache="first-block", **SIZE)
    with pytest.raises(RuntimeError, match="stop"):
        text_to_video.generate(plan, backbone, on_step=fail)
    assert not backbone.transformer.is_cache_enabled
    assert not any("forward" in vars(block) for block in backbone.blocks())


def test_magcache_goes_by_what_it_has_calibrated(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    ratios = tmp_path / "ratios.json"
    plain = made(folder, backbone)
    calibrated = made(folder, backbone, cache=f"magcache:calibrate={ratios}")
    assert torch.equal(calibrated.latents, plain.latents)
    assert len(json.loads(ratios.read_text())) == STEPS
    cached = made(folder, backbone, cache=f"magcache:ratios={ratios},threshold=100,max_skip=1,retention=0.5")
    assert cached.skipped is not None
    # In the second half, every other pass is skipped, all of its blocks.
    assert cached.skipped.share == pytest.approx(0.25)


@pytest.mark.parametrize("values", [{"sampler": "heun"}, {"sampler": "native"}, {"known_frames": "timesteps"}])
def test_first_block_goes_with_samplers_and_known_frames(
    tiny_expanded: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    if "known_frames" in values:
        image = tmp_path / "first.png"
        Image.new("RGB", (64, 64), "red").save(image)
        values = {**values, "image": image}
    backbone = loaded(tiny_expanded)
    plain = made(tiny_expanded, backbone, **values)
    off = made(tiny_expanded, backbone, cache="first-block:threshold=0", **values)
    assert torch.equal(off.latents, plain.latents)
    cached = made(tiny_expanded, backbone, cache="first-block:threshold=0.9", **values)
    assert cached.skipped is not None
    assert cached.skipped.skipped > 0
    # The first image's latents are held, whatever is skipped.
    if "image" in values:
        assert torch.equal(cached.latents[:, :, 0], plain.latents[:, :, 0])


def test_families_of_a_cache_are_those_whose_blocks_diffusers_knows() -> None:
    from diffusers.hooks._helpers import TransformerBlockRegistry
    from diffusers.models.transformers import (
        cogvideox_transformer_3d,
        transformer_hunyuan_video,
        transformer_hunyuan_video15,
        transformer_ltx,
        transformer_ltx2,
        transformer_wan,
    )

    blocks = {
        "wan": transformer_wan.WanTransformerBlock,
        "hunyuan-video": transformer_hunyuan_video.HunyuanVideoTransformerBlock,
        "hunyuan-video-1.5": transformer_hunyuan_video15.HunyuanVideo15TransformerBlock,
        "cogvideox": cogvideox_transformer_3d.CogVideoXBlock,
        "ltx-video": transformer_ltx.LTXVideoTransformerBlock,
        "ltx-2": transformer_ltx2.LTX2VideoTransformerBlock,
    }
    TransformerBlockRegistry._register()
    known = {family for family, block in blocks.items() if block in TransformerBlockRegistry._registry}
    assert known == set(caching.FirstBlock.families) == set(caching.MagCache.families)
    assert set(caching.TaylorSeer.families) == set(blocks)


@pytest.mark.parametrize(
    ("model", "cache", "values", "says"),
    [
        ("toyland", "frist-block", {}, 'Did you mean "first-block"'),
        ("toyland", "first-block:threshold=-1", {}, "threshold of -1"),
        ("toyland", "taylorseer:interval=0", {}, "interval=0"),
        ("toyland", "magcache", {}, "ratios that are a model's own"),
        ("toyland", "magcache:ratios=nowhere.json", {}, "nowhere.json: No such file"),
        ("toyland", "magcache:calibrate=no/where/r.json", {}, "There is no folder no/where"),
        ("toyland", "teacache", {}, "first-block goes by the same idea"),
        ("toyland", "pyramid", {}, "one memory for both branches"),
        ("toyland", "taylorseer", {"sampler": "heun"}, "makes two in each"),
        ("toyland", "taylorseer", {"compile": True}, "inside of blocks"),
        ("ltx-2", "first-block", {}, "does not know the blocks"),
        ("hunyuan-video-1.5", "magcache:calibrate=r.json", {}, "does not know the blocks"),
        ("wan2.2-14b", "magcache:calibrate=r.json", {}, "has two"),
        ("consisid", "first-block", {}, "does not know the blocks"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    model: str, cache: str, values: dict[str, Any], says: str
) -> None:
    checkpoint = resolve(model)
    options = {"sampler": "euler", "compile": False, **values}
    with pytest.raises(UsageError, match=says):
        caching.check(cache, checkpoint, sampler=options["sampler"], is_compiled=options["compile"])


def test_what_the_catalogue_says_of_caches_is_true() -> None:
    for name in ("toyland", "wan2.1-1.3b", "hunyuan-video", "hunyuan-video-1.5", "cogvideox-5b", "ltx-video", "ltx-2"):
        checkpoint = resolve(name)
        assert checkpoint.can.cache
        caching.check("taylorseer", checkpoint, sampler="native", is_compiled=False)
