"""`vgen bench quantize`, with few tokens and a tiny checkpoint."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vgen import checkpoints, cli
from vgen.errors import UsageError
from vgen.pipelines.bench import quantize as bench


def test_bench_quantize_times_layers_and_a_run_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "SHAPES", ((64, 32),))
    command = ["bench", "quantize", "--tokens", "24", "--repeats", "2", "--scheme", "w8a8", "--scheme", "w4a8"]
    result = CliRunner().invoke(cli.app, [*command, "--model", "none", "--device", "cpu", "--format", "json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (row,) = found["linear"]
    assert row["seconds"].keys() == row["speedup"].keys() == {"bfloat16", "w8a8", "w4a8"}
    assert row["tokens"] == 24 and row["inputs"] == 64 and min(row["seconds"].values()) > 0
    assert row["speedup"]["bfloat16"] == 1
    assert row["speedup"]["w8a8"] == pytest.approx(row["seconds"]["bfloat16"] / row["seconds"]["w8a8"], rel=0.1)
    # 8 bits and the scales of 32 channels, of 16 bits for 64 x 32 weights.
    assert row["bytes_share"]["w8a8"] == pytest.approx((64 * 32 + 4 * 32) / (2 * 64 * 32), abs=1e-4)
    assert found["arithmetic"]["w8a8"] in ("int8", "simulated") and "run" not in found


def test_bench_quantize_denoises_a_model_in_turns(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checkpoints.resolve(str(tiny_checkpoint))
    small = replace(found.defaults, width=32, height=32, num_frames=5, num_inference_steps=2)
    monkeypatch.setattr(checkpoints, "resolve", lambda model: replace(found, defaults=small))
    told = bench.bench_quantize(schemes=["w8a8"], tokens=[], repeats=1, model="tiny", device="cpu")
    assert (
        told["run"]["steps"] == 2
        and not told["run"]["compiled"]
        and told["run"]["seconds"].keys() == {"bfloat16", "w8a8"}
    )
    assert min(told["run"]["seconds"].values()) > 0
    # Captured as it is, and not made to C++, which takes long: what counts is one graph for all blocks of a variant.
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    told = bench.bench_quantize(schemes=["w8a8"], tokens=[], repeats=1, model="tiny", device="cpu", compiled=True)
    assert told["run"]["compiled"] and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    with pytest.raises(UsageError, match="Groups of 64 do not divide"):
        bench.bench_quantize(schemes=["w4a8"], tokens=[], repeats=1, model="tiny", device="cpu")


def test_what_cannot_be_measured_is_refused() -> None:
    for options, said in (
        (["--scheme", "w9"], 'no scheme "w9"'),
        (["--repeats", "0"], "nothing to measure"),
        (["--tokens", "1" + "0" * 400], "The tensors do not fit"),
        (["--model", "toylnd"], 'Did you mean "toyland"'),
    ):
        result = CliRunner().invoke(cli.app, ["bench", "quantize", *options])
        assert result.exit_code == 2 and said in result.stderr
