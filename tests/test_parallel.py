"""What several GPUs can share, asked before a model is loaded."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from typer.testing import CliRunner

from tests.parity import loaded, planned
from vgen import cli, parallel
from vgen.checkpoints import resolve
from vgen.errors import UsageError
from vgen.pipelines import ranks, run
from vgen.plan import plan
from vgen.request import GenerateRequest

CATALOGUE = yaml.safe_load((Path(__file__).parent.parent / "checkpoints.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("method", "num_gpus", "expected"),
    [("ulysses", 4, (4, 1)), ("ring", 3, (1, 3)), ("unified", 4, (2, 2)), ("unified:ulysses_degree=4", 8, (4, 2))],
)
def test_the_degrees_of_a_method_multiply_to_the_gpus(method: str, num_gpus: int, expected: tuple[int, int]) -> None:
    assert parallel.degrees(method, num_gpus) == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gpus": 3}, "4 heads .* 3 GPUs(.|\n)*Ulysses 2 or 4, or use --context-parallel ring"),
        ({"gpus": 8, "context_parallel": "unified:ulysses_degree=3"}, "groups of 3(.|\n)*ulysses_degree=2 or 4"),
        ({"gpus": 2, "context_parallel": "unified"}, "groups of 2(.|\n)*use ulysses or ring"),
        ({"gpus": 4, "context_parallel": "unified", "num_frames": 1, "width": 48, "height": 48}, "9 tokens"),
        ({"gpus": 2, "context_parallel": "ulyses"}, 'Did you mean "ulysses"'),
        ({"gpus": 2, "context_parallel": "ring", "device": "cpu"}, "log-sum-exp"),
        ({"gpus": 2, "context_parallel": "ring", "dtype": "float32"}, "log-sum-exp"),
        ({"gpus": 2, "device": "cuda:1"}, "cuda:1 is one device"),
        ({"gpus": 2, "device": "mps"}, "mps is one device"),
        ({"gpus": 2, "device": "cpu", "cache": "first-block"}, "--cache does not go together with --gpus"),
        ({"gpus": 0}, "cannot be made on 0 GPUs"),
        ({"context_parallel": "ring"}, "there is one"),
        ({"gpus": 2, "model": "hunyuan-video"}, 'family "hunyuan-video"'),
        ({"gpus": 2, "model": "cogvideox-2b"}, 'family "cogvideox"'),
    ],
)
def test_what_gpus_cannot_share_is_refused_by_name(options: dict[str, Any], says: str) -> None:
    request = GenerateRequest(prompt="a red ball", **options)
    with pytest.raises(UsageError) as raised:
        plan(request, resolve(request.model))
    assert re.search(says, str(raised.value)), str(raised.value)


def test_one_gpu_is_as_if_nothing_was_asked() -> None:
    checkpoint = resolve("toyland")
    one = plan(GenerateRequest(prompt="a red ball", gpus=1, context_parallel="ring", seed=1), checkpoint)
    assert one == plan(GenerateRequest(prompt="a red ball", seed=1), checkpoint)
    assert plan(GenerateRequest(prompt="a", gpus=2), checkpoint).context_parallel == "ulysses"


def test_the_dry_run_shows_it() -> None:
    result = CliRunner().invoke(cli.app, ["generate", "a red ball", "--gpus", "2", "--device", "cpu", "--dry-run"])
    assert result.exit_code == 0, result.stderr
    assert {"  gpus: 2", "  context_parallel: ulysses"} <= set(result.stdout.splitlines())


def test_lines_with_different_gpus_are_refused(tmp_path: Path) -> None:
    checkpoint = resolve("toyland")
    jobs = [
        run.Job(plan=plan(GenerateRequest(prompt="a", gpus=gpus), checkpoint), output=tmp_path / "a.mp4")
        for gpus in (1, 2)
    ]
    with pytest.raises(UsageError, match="some for 2"):
        ranks.num_gpus(jobs)
    assert ranks.num_gpus(jobs[1:]) == 2


@pytest.mark.parametrize("width", [32, 80])
def test_the_tokens_that_a_plan_counts_are_those_of_the_model(width: int, tiny_checkpoint: Path) -> None:
    made = planned(tiny_checkpoint, "a red ball", width=width, height=48, num_frames=9)
    frames, height, columns = loaded(tiny_checkpoint).token_grid(9, 48, width)
    counted = parallel.num_tokens(9, 48, width, made.checkpoint.rules)
    assert counted == frames * height * columns


@pytest.mark.parametrize("family", CATALOGUE["families"])
def test_families_that_share_are_those_that_diffusers_can_split(family: str) -> None:
    """LTX-2 alone has a plan and is left out: the catalogue says why."""
    import diffusers

    entry = CATALOGUE["families"][family]
    pipelines = [name for name in entry["pipelines"] if hasattr(diffusers, name)]
    seen = []
    for name in pipelines:
        parameters = inspect.signature(getattr(diffusers, name)).parameters
        if "transformer" not in parameters:  # a placeholder: ConsisID needs packages that are not here
            continue
        hint = parameters["transformer"].annotation
        if isinstance(hint, str):
            hint = eval(hint, vars(importlib.import_module(getattr(diffusers, name).__module__)))
        for transformer in get_args(hint) or (hint,):
            if hasattr(transformer, "_cp_plan"):
                can = transformer._cp_plan is not None and family != "ltx-2"
                assert can == ("context-parallel" in entry["can"]), transformer
                seen.append(transformer)
    assert seen
