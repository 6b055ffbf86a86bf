"""TaylorSeer: between steps that are computed, what attention would say is extrapolated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vgen.errors import UsageError

# The attention modules of the blocks of every family, self and cross; of LTX-2 those of the video. diffusers' own
# pattern ends in "attn" and finds none where a block has two.
ATTENTION = r"(single_)?(transformer_)?blocks\.\d+\.attn[12]?"


@dataclass(frozen=True, kw_only=True)
class TaylorSeer:
    """Computes attention in every `interval`-th step, and in the steps between extrapolates it by a Taylor series.

    The series has derivatives up to `order`, from differences of the steps that were computed; the first `warmup`
    steps are (Liu et al. 2025, arXiv:2503.06923). With an interval of 1 all are.
    """

    interval: int = 5
    order: int = 1
    warmup: int = 3

    families: ClassVar[tuple[str, ...]] = (
        "wan", "hunyuan-video", "hunyuan-video-1.5", "cogvideox", "ltx-video", "ltx-2",
    )  # fmt: skip
    parts: ClassVar[str] = "attention"
    counts_passes: ClassVar[bool] = True
    is_inside_blocks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value, lowest in (
            ("interval", self.interval, 1),
            ("order", self.order, 0),
            ("warmup", self.warmup, 1),
        ):
            if value < lowest:
                raise UsageError(f"{name}={value} is not legal.", tip=f"choose {lowest} or more.")

    def config(self, num_inference_steps: int, dtype: Any) -> Any:
        """Return diffusers' configuration of the cache; the series is kept in the model's own dtype."""
        from diffusers import TaylorSeerCacheConfig

        return TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.warmup,
            max_order=self.order,
            taylor_factors_dtype=dtype,
            cache_identifiers=[ATTENTION],
        )
