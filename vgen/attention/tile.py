"""Tiles of frames (Efficient-vDiT, arXiv:2502.06155): each frame sees itself and a few that everyone sees."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen.attention.patterns import Choice, Grid, Options, Site
from vgen.errors import UsageError, reason_of

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.attention.blocks import Layout


@dataclass(frozen=True, kw_only=True)
class Tile(Options):
    """The diagonal of frames, and `global` reference frames at even distances that see and are seen by all.

    Of F latent frames, the share (F - k)(F - k - 1) / F^2 of the pairs is left out. With `plan`, a file that vgen
    attention search wrote, k is each layer's own.
    """

    global_: int = 1
    plan: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.global_ < 0:
            raise UsageError(
                f"{self.global_} global frames are not legal.", tip="choose 0 or more, as in tile:global=1."
            )
        if self.plan:
            read_plan(Path(self.plan))

    def check(self, grid: Grid, num_layers: int) -> None:
        """Raise `UsageError` for a plan of another model or length, and for more global frames than there are."""
        if not self.plan:
            if self.global_ > grid[0]:
                raise UsageError(
                    f"{self.global_} global frames are more than the {grid[0]} latent frames of this video.",
                    tip=f"choose up to {grid[0]}, where all is dense.",
                )
            return
        plan = read_plan(Path(self.plan))
        if len(plan["layers"]) != num_layers or plan["grid"][0] != grid[0]:
            raise UsageError(
                f"The plan {self.plan} is for {len(plan['layers'])} layers and {plan['grid'][0]} latent frames, but "
                f"the model has {num_layers} and the video {grid[0]}.",
                tip="search again for this model and length: vgen attention search.",
            )

    def num_global(self, layer: int, num_frames: int) -> int:
        """Return k in a layer, for a video of so many latent frames."""
        if not self.plan:
            return self.global_
        planned: int | None = read_plan(Path(self.plan))["layers"][layer]["global"]
        return num_frames if planned is None else planned

    def layout(self, grid: Grid, tokens: Tensor, text: Tensor) -> Layout:
        """Return blocks that no two frames share."""
        from vgen.attention.blocks import cut

        frames = list(tokens.flatten(1))
        return cut(frames, text, block=self.block, num_tokens=tokens.numel() + len(text))

    def choose(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, site: Site) -> Choice:
        """Return the mask of this layer's number of global frames."""
        from vgen.attention.blocks import with_text

        num_frames = site.grid[0]
        if "global" not in site.memory:
            site.memory["global"] = self.num_global(site.layer, num_frames)
        num_global = site.memory["global"]
        if num_global == num_frames and self.kernel == "auto":
            return Choice()
        key = ("tile", id(layout), num_global)
        if key not in site.shared:
            per_frame = (layout.num_blocks - layout.num_text_blocks) // num_frames
            tiles = frame_tiles(num_frames, num_global, device=q.device)
            video = tiles.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)
            site.shared[key] = with_text(video, layout)
        return Choice(mask=site.shared[key])


def frame_tiles(num_frames: int, num_global: int, device: Any = None) -> Tensor:
    """Return which frames see which, bool [F, F]; the global frames are at i * F // k."""
    import torch

    seen = torch.eye(num_frames, dtype=torch.bool, device=device)
    everywhere = [i * num_frames // num_global for i in range(num_global)]
    seen[everywhere] = True
    seen[:, everywhere] = True
    return seen


def read_plan(path: Path) -> dict[str, Any]:
    """Return a plan: "grid" [T, H, W], and "layers", each with "global", None where dense. Raises `UsageError`."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        for layer in plan["layers"]:
            if layer["global"] is not None and not 0 <= layer["global"] <= plan["grid"][0]:
                raise ValueError(f"{layer['global']} global frames of {plan['grid'][0]}")
    except FileNotFoundError as error:
        raise UsageError(f"There is no plan {path}.", tip="make one with: vgen attention search -o FILE.") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        is_other = isinstance(error, LookupError | TypeError)
        raise UsageError(
            f"{path} is no plan of tiles: {'it is another kind of JSON' if is_other else reason_of(error)}.",
            tip="make one with: vgen attention search -o FILE.",
        ) from error
    return dict(plan)
