"""First Block Cache: where the first block does as it did in the last step, the others are not asked again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from vgen.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class FirstBlock:
    """Skips all blocks but the first while what it adds differs from the last step's by `threshold` at most.

    The difference is relative and in the mean; the residual of the other blocks is then that of the last pass that ran
    them (ParaAttention's First Block Cache, after TeaCache, Liu et al. 2024, arXiv:2411.19108). At 0 none is skipped.
    """

    threshold: float = 0.1

    families: ClassVar[tuple[str, ...]] = ("wan", "hunyuan-video", "cogvideox", "ltx-video")
    parts: ClassVar[str] = "blocks"
    counts_passes: ClassVar[bool] = False
    is_inside_blocks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise UsageError(f"A threshold of {self.threshold:g} is not legal.", tip="choose 0 or more, often 0.1.")

    def config(self, num_inference_steps: int, dtype: Any) -> Any:
        """Return diffusers' configuration of the cache."""
        from diffusers import FirstBlockCacheConfig

        return FirstBlockCacheConfig(threshold=self.threshold)
