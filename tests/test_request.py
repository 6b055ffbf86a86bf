from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from tests.strategies import requests
from vgen.errors import UsageError
from vgen.request import GenerateRequest


@given(requests)
def test_a_request_goes_through_json_unchanged(request: GenerateRequest) -> None:
    assert GenerateRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no prompt"),
        ({"prompt": 5}, 'The field "prompt" is 5, but text is expected'),
        ({"prompt": "a", "width": "wide"}, "The field \"width\" is 'wide', but a whole number is expected"),
        ({"prompt": "a", "width": True}, "a whole number is expected"),
        ({"prompt": "a", "fps": "8"}, "a number is expected"),
        ({"prompt": "a", "model": None}, "text is expected"),
        ({"prompt": "a", "image": 3}, "a path is expected"),
        ({"prompt": "a", "colour": "red"}, 'no field "colour"'),
    ],
)
def test_a_dict_that_is_no_request_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GenerateRequest.from_dict(values)
