from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vgen import legal


@given(st.floats(-1e9, 1e9), st.integers(1, 64), st.integers(0, 3))
def test_nearest_legal_numbers_are_legal_and_nearest(value: float, multiple: int, offset: int) -> None:
    lowest, highest = multiple + offset, 1000 * multiple + offset
    near = legal.nearest(value, multiple=multiple, offset=offset, lowest=lowest, highest=highest)
    assert 1 <= len(near) <= 2
    assert all((number - offset) % multiple == 0 and lowest <= number <= highest for number in near)
    if lowest <= value <= highest:
        assert near[0] <= value <= near[-1]
        assert near[-1] - near[0] in (0, multiple)
