"""What hypothesis draws for several tests."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from vgen.legal import MAX_SEED
from vgen.request import GenerateRequest

requests = st.builds(
    GenerateRequest,
    prompt=st.text(min_size=1),
    negative_prompt=st.none() | st.text(),
    seed=st.none() | st.integers(0, MAX_SEED),
    guidance_scale=st.none() | st.floats(0, 20),
    width=st.none() | st.integers(1, 64).map(lambda k: 16 * k),
    num_frames=st.none() | st.integers(0, 20).map(lambda k: 4 * k + 1),
    fps=st.none() | st.integers(1, 60),
    image=st.none() | st.just(Path("folder") / "first.png"),
)
