"""V from the inversion to the denoising: what is stored, found and taken, on tiny models of several families."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny, tiny_cogvideox, tiny_hunyuan_video, tiny_hunyuan_video_15, tiny_ltx_video
from tests.parity import loaded, shot_of
from vgen.editing.sharing import STORES, Memory, Sharing, num_bytes, schedule, sites
from vgen.sampling.inversion import SOLVERS, evaluations, invert

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0])
FAMILIES: dict[str, tuple[Callable[[Path], Path], tuple[int, int, int]]] = {
    "wan": (tiny.build, (9, 32, 48)),
    "hunyuan-video": (tiny_hunyuan_video.build, (9, 32, 48)),
    "hunyuan-video-1.5": (tiny_hunyuan_video_15.build, (5, 64, 64)),
    "ltx-video": (tiny_ltx_video.build, (9, 64, 96)),
    "cogvideox": (tiny_cogvideox.build, (9, 48, 64)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    build, size = FAMILIES[request.param]
    return loaded(build(tmp_path_factory.mktemp("family") / request.param)), shot_of(*size)


def flow(backbone: Any, shot: Any, prompt: str) -> Callable[[Tensor, Tensor], Tensor]:
    (text,) = backbone.encode_prompt([prompt])
    return functools.partial(backbone.velocity, text=text, shot=shot, guidance_scale=1.0)


def test_both_evaluations_of_a_step_are_matched_by_the_interval() -> None:
    found = schedule(SOLVERS["rf-solver"], SIGMAS, num_steps=2, by="interval")
    assert found.read == ((0, 1), (0, 0), (1, 1), (1, 0), None, None, None, None)
    # The last two steps of the inversion, the one nearest the noise last.
    assert found.store == (None, None, None, None, (1, 1), (1, 0), (0, 1), (0, 0))
    assert (found.after, found.num_features) == ((), 4)


def test_by_time_each_evaluation_finds_the_one_at_its_sigma() -> None:
    found = schedule(SOLVERS["rf-solver"], SIGMAS, num_steps=2, by="time")
    assert [key and key[0] for key in found.read[:4]] == pytest.approx([1.0, 0.95, 0.9, 0.8])
    assert [key and pytest.approx(key[0]) for key in found.store] == [None] * 5 + [0.8, 0.9, 0.95]
    # No step of an inversion begins at the noise, where it ends.
    assert found.after == ((1.0, 0),)


def test_what_fireflow_evaluates_only_once_is_stored_after_the_inversion() -> None:
    found = schedule(SOLVERS["fireflow"], SIGMAS, num_steps=2, by="interval")
    assert found.read == ((0, 1), (0, 0), (1, 0), None, None)
    assert found.store == (None, None, None, (1, 0), (0, 0))
    assert found.after == ((0, 1),)


@pytest.mark.parametrize(("depth", "first"), [(60, 41), (57, 39), (2, 1), (1, 0)])
def test_the_default_depth_is_that_of_the_released_models(depth: int, first: int) -> None:
    class Deep:
        class checkpoint:  # noqa: N801
            class can:  # noqa: N801
                two_transformers = False

        def attention_slots(self) -> list[Any]:
            slots = [torch.nn.Module() for _ in range(depth)]
            for slot in slots:
                slot.to_v = torch.nn.Linear(1, 1)
            return slots

    assert list(sites(Deep(), 0.68, 1.0)) == [f"{block}.to_v" for block in range(first, depth)]


@pytest.mark.parametrize("by", ["interval", "time"])
@pytest.mark.parametrize("solver", SOLVERS)
@torch.inference_mode()
def test_every_family_stores_what_was_told_and_finds_all_of_it(family: tuple[Any, Any], solver: str, by: str) -> None:
    backbone, shot = family
    solve, sigmas = SOLVERS[solver], backbone.sigmas(3, shot)
    plan, found = schedule(solve, sigmas, num_steps=2, by=by), sites(backbone, 0.5, 1.0)
    told = num_bytes(backbone, shot, found, plan, 4)
    sharing = Sharing(found, plan, Memory())
    source, target = flow(backbone, shot, "a red ball"), flow(backbone, shot, "a blue cube jumps")
    data = backbone.noise(shot) / 2
    noise = invert(solve, sharing.storing(source), data, sigmas)
    sharing.finish(source, noise, sigmas[0])
    assert sharing.store.num_bytes == told > 0
    shared = solve(sharing.reading(target), noise, sigmas)
    reading_steps = sum(len(step) for step in evaluations(solve, sigmas)[:2])
    assert sharing.hits == sharing.reads == reading_steps * len(found)
    plain = solve(target, noise, sigmas)
    assert (shared - plain).abs().max() > 1e-6
    assert torch.equal(solve(target, noise, sigmas), plain), "the model is as it was"


@torch.inference_mode()
def test_a_round_trip_with_the_models_own_velocity_is_second_order(family: tuple[Any, Any]) -> None:
    backbone, shot = family
    model, data = flow(backbone, shot, "a red ball"), backbone.noise(shot) / 2

    # At one sigma: over time a random model's velocity turns faster than any grid could follow.
    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        return model(latents, torch.tensor(0.5))

    def lost(solver: str, num_steps: int) -> float:
        sigmas = torch.linspace(1, 0, num_steps + 1)
        noise = invert(SOLVERS[solver], velocity, data, sigmas)
        return float((SOLVERS[solver](velocity, noise, sigmas) - data).square().mean().sqrt())

    assert lost("rf-solver", 2) / lost("rf-solver", 4) > 3.5
    assert lost("rf-solver", 4) < lost("euler", 8) / 2


@torch.inference_mode()
def test_the_same_prompt_back_with_all_features_is_no_worse(family: tuple[Any, Any]) -> None:
    backbone, shot = family
    solve, sigmas = SOLVERS["rf-solver"], torch.linspace(0.9, 0, 5)
    source, data = flow(backbone, shot, "a red ball"), backbone.noise(shot) / 2

    def lost(num_steps: int, by: str) -> float:
        sharing = Sharing(sites(backbone, 0.5, 1.0), schedule(solve, sigmas, num_steps=num_steps, by=by), Memory())
        noise = invert(solve, sharing.storing(source), data, sigmas)
        sharing.finish(source, noise, sigmas[0])
        return float((solve(sharing.reading(source), noise, sigmas) - data).abs().mean())

    # V of the very time differs from the model's own by the inversion's error alone.
    assert lost(4, "time") < 1.05 * lost(0, "time")


@pytest.mark.parametrize("kind", STORES)
def test_stores_give_back_what_they_were_given(tmp_path: Path, kind: str) -> None:
    store = STORES[kind](tmp_path)
    value = torch.randn(2, 5, 4)
    store.put("0-1-3.to_v", value)
    found = store.get("0-1-3.to_v")
    assert store.num_bytes == value.numel() * (2 if kind == "half" else 4)
    assert torch.equal(found.float(), value.bfloat16().float() if kind == "half" else value)
    assert store.get("1-1-3.to_v") is None
    assert store.names() == ["0-1-3.to_v"]
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_miss_is_counted_and_changes_nothing(tiny_checkpoint: Path) -> None:
    backbone, shot = loaded(tiny_checkpoint), shot_of(9, 32, 48)
    sigmas = backbone.sigmas(3, shot)
    plan, found = schedule(SOLVERS["euler"], sigmas, num_steps=1, by="interval"), sites(backbone, 0.5, 1.0)
    empty = Sharing(found, plan, Memory())
    velocity, noise = flow(backbone, shot, "a red ball"), backbone.noise(shot)
    with torch.inference_mode():
        assert torch.equal(empty.reading(velocity)(noise, sigmas[0]), velocity(noise, sigmas[0]))
    assert (empty.reads, empty.hits) == (1, 0)
