"""MagCache: passes are skipped for as long as the sizes that residuals had in a calibration add up to little error."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vgen import files
from vgen.errors import UsageError, reason_of


@dataclass(frozen=True, kw_only=True)
class MagCache:
    """Skips all blocks, at most `max_skip` times in a row, while the error that `ratios` foretell is in `threshold`.

    `ratios` is a JSON file with a number per step: by how much the residual of all blocks was larger than in the step
    before. They are a model's own; `calibrate` is where to write those of a run that skips nothing. The share
    `retention` of the steps, at the beginning, is not skipped (Ma et al. 2025, arXiv:2506.09045). At a threshold of 0
    none is.
    """

    ratios: str = ""
    calibrate: str = ""
    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2

    families: ClassVar[tuple[str, ...]] = ("wan", "hunyuan-video", "cogvideox", "ltx-video")
    parts: ClassVar[str] = "blocks"
    counts_passes: ClassVar[bool] = True
    is_inside_blocks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise UsageError(f"A threshold of {self.threshold:g} is not legal.", tip="choose 0 or more, often 0.06.")
        if self.max_skip < 0:
            raise UsageError(f"max_skip={self.max_skip} is not legal.", tip="choose 0 or more.")
        if not 0 <= self.retention <= 1:
            raise UsageError(f"retention={self.retention:g} is not legal.", tip="choose from 0 to 1.")
        if bool(self.ratios) == bool(self.calibrate):
            raise UsageError(
                "magcache goes by ratios that are a model's own, and vgen knows those of none.",
                tip="measure them once with --cache magcache:calibrate=ratios.json, and then use "
                "--cache magcache:ratios=ratios.json.",
            )
        if self.ratios:
            read_ratios(Path(self.ratios))
        elif Path(self.calibrate).exists():
            raise UsageError(f"{self.calibrate} exists.", tip="give the ratios another name, or remove it.")
        elif not Path(self.calibrate).parent.is_dir():
            folder = Path(self.calibrate).parent
            raise UsageError(f"There is no folder {folder} to write the ratios to.", tip="make it, or name another.")

    def config(self, num_inference_steps: int, dtype: Any) -> Any:
        """Return diffusers' configuration of the cache."""
        from diffusers.hooks import MagCacheConfig

        if self.calibrate:
            # With a step more than there are, diffusers does not get to print what it has found and forget it.
            return MagCacheConfig(calibrate=True, num_inference_steps=num_inference_steps + 1)
        return MagCacheConfig(
            threshold=self.threshold,
            # An error of exactly 0 would pass a threshold of 0.
            max_skip_steps=self.max_skip if self.threshold else 0,
            retention_ratio=self.retention,
            num_inference_steps=num_inference_steps,
            mag_ratios=read_ratios(Path(self.ratios)),
        )

    def finish(self, transformer: Any) -> None:
        """Write what was calibrated with the prompt."""
        if not self.calibrate:
            return
        from diffusers.hooks.mag_cache import _MAG_CACHE_BLOCK_HOOK

        hooks = [getattr(module, "_diffusers_hook", None) for module in transformer.modules()]
        tail = [hook.get_hook(_MAG_CACHE_BLOCK_HOOK) for hook in hooks if hook is not None]
        state = next(hook.state_manager for hook in tail if hook is not None and hook.is_tail)._state_cache["cond"]
        files.write_text(Path(self.calibrate), json.dumps(state.calibration_ratios) + "\n")


def read_ratios(path: Path) -> list[float]:
    """Return the numbers in a JSON file; raise `UsageError` when there are none."""
    try:
        ratios = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"Cannot read the ratios in {path}: {reason_of(error)}.",
            tip="measure them with --cache magcache:calibrate=ratios.json.",
        ) from error
    is_numbers = isinstance(ratios, list) and all(isinstance(value, int | float) for value in ratios)
    if not is_numbers or not ratios or not all(math.isfinite(value) for value in ratios):
        raise UsageError(
            f"{path} holds no ratios: a JSON list of numbers is expected.",
            tip="measure them with --cache magcache:calibrate=ratios.json.",
        )
    return [float(value) for value in ratios]
