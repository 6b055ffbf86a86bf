import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vgen import batch
from vgen.errors import UsageError, VgenError
from vgen.request import GenerateRequest


def lines_of(tmp_path: Path, name: str, content: str | bytes, **defaults: object) -> list[batch.PromptLine]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return batch.read(path, defaults)


def test_text_file_is_a_prompt_per_line(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, "p.txt", "a red ball\n\n  a {blue} cube\t\r\n", width=64)
    assert [(line.number, line.request) for line in lines] == [
        (1, GenerateRequest(prompt="a red ball", width=64)),
        (3, GenerateRequest(prompt="a {blue} cube", width=64)),
    ]


def test_json_lines_win_over_the_defaults(tmp_path: Path) -> None:
    content = '{"prompt": "a", "steps": 3, "seed": 9}\n{"prompt": "b", "seconds": 2, "negative": "c"}\n'
    first, second = lines_of(tmp_path, "p.jsonl", content, num_frames=5, num_inference_steps=1, negative_prompt="n")
    assert first.request == GenerateRequest(
        prompt="a", num_frames=5, num_inference_steps=3, negative_prompt="n", seed=9
    )
    assert second.request == GenerateRequest(prompt="b", seconds=2, num_inference_steps=1, negative_prompt="c")


def test_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (line,) = lines_of(tmp_path, "p.txt", b"\xef\xbb\xbfa ball")
    assert line.request == GenerateRequest(prompt="a ball")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a"', "not valid JSON"),
        ("just words", "not valid JSON"),
        ('["a"]', "not a JSON object"),
        ('{"prompt": "a", "widht": 64}', 'no field "widht". Did you mean "width"'),
        ('{"prompt": "a", "width": "64"}', "\"width\" is '64', but a whole number is expected"),
        ('{"width": 64}', "no prompt"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
)
def test_broken_line_is_an_error_among_the_others(tmp_path: Path, line: str | bytes, says: str) -> None:
    broken = line if isinstance(line, bytes) else line.encode()
    lines = lines_of(tmp_path, "p.jsonl", b'{"prompt": "before"}\n' + broken + b'\n{"prompt": "after"}\n')
    assert [line.number for line in lines] == [1, 2, 3]
    assert isinstance(lines[1].request, UsageError)
    assert says in str(lines[1].request)
    assert lines[2].request == GenerateRequest(prompt="after")


def test_files_without_prompts_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no prompts"):
        lines_of(tmp_path, "p.txt", "\n \n")
    for content in ("a ball".encode("utf-16"), b"\0\0\0 ftypisom"):
        with pytest.raises(UsageError, match="is no text in UTF-8"):
            lines_of(tmp_path, "p.txt", content)
    with pytest.raises(VgenError, match=r"Cannot read the prompts in .*: No such file"):
        batch.read(tmp_path / "missing.txt", {})
    with pytest.raises(VgenError, match=r"Cannot read the prompts in .*: Is a directory"):
        batch.read(tmp_path, {})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), name=st.sampled_from(["p.txt", "p.jsonl"]))
def test_any_bytes_are_lines_or_one_error(tmp_path: Path, content: bytes, name: str) -> None:
    try:
        lines = lines_of(tmp_path, name, content)
    except UsageError:
        assert b"\0" in content or not content.removeprefix(b"\xef\xbb\xbf").strip()
    else:
        assert all(isinstance(line.request, GenerateRequest | UsageError) for line in lines)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(min_size=1, max_size=200).filter(str.strip))
def test_any_prompt_survives_json(tmp_path: Path, prompt: str) -> None:
    (line,) = lines_of(tmp_path, "p.jsonl", json.dumps({"prompt": prompt}))
    assert line.request == GenerateRequest(prompt=prompt)


def requests(*requests: GenerateRequest | VgenError) -> list[batch.PromptLine]:
    return [batch.PromptLine(number=number, request=request) for number, request in enumerate(requests, start=1)]


def test_every_line_takes_every_seed_unless_it_has_its_own(tiny_checkpoint: Path) -> None:
    model = str(tiny_checkpoint)
    lines = requests(GenerateRequest(prompt="a", model=model), GenerateRequest(prompt="b", model=model, seed=9))
    planned, failures = batch.plan_lines(lines, [1, 2])
    assert [(line.label, line.plan.prompt, line.plan.seed) for line in planned] == [
        ("1-1", "a", 1),
        ("1-2", "a", 2),
        ("2", "b", 9),
    ]
    assert not failures


def test_line_that_cannot_be_planned_is_a_failure_with_its_number(tiny_checkpoint: Path) -> None:
    model = str(tiny_checkpoint)
    lines = requests(
        GenerateRequest(prompt="a", model=model, width=100),
        UsageError("broken"),
        GenerateRequest(prompt="c", model="no-such-model"),
        GenerateRequest(prompt="d", model=model),
    )
    planned, failures = batch.plan_lines(lines, [])
    assert [line.number for line in planned] == [4]
    assert [(failure.line, failure.prompt) for failure in failures] == [(1, "a"), (2, None), (3, "c")]


def test_model_that_cannot_run_yet_is_no_plan() -> None:
    planned, failures = batch.plan_lines(requests(GenerateRequest(prompt="a", model="fastwan2.1-1.3b")), [])
    assert not planned
    assert "cannot run it yet" in str(failures[0].error)


def test_request_from_no_file_raises_its_own_error(tiny_checkpoint: Path) -> None:
    request = GenerateRequest(prompt="a", model=str(tiny_checkpoint), width=100)
    with pytest.raises(UsageError, match="100"):
        batch.plan_lines([batch.PromptLine(number=None, request=request)], [])
