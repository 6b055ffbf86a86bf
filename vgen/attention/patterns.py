"""What a pattern of attention is, and what it is told of the place where it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vgen.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.attention.blocks import BlockMask, Layout

# (T, H, W): the tokens of a video, of which W are neighbours in the sequence.
Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where in a run attention is asked for: layer, step of `num_steps`, and branch of guidance, all from 0.

    `scale` is what products of query and key are multiplied by. `memory` lasts for this layer and branch until the
    run's end, `shared` for all of them; a pattern keeps there what it likes.
    """

    layer: int
    num_layers: int
    step: int
    num_steps: int
    branch: int
    grid: Grid
    scale: float
    num_heads: int
    memory: dict[str, Any] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a pattern chose: a mask, or None for dense attention, whose output it may have found on the way."""

    mask: BlockMask | None = None
    output: Tensor | None = None


class Pattern(Protocol):
    """Which blocks of keys each block of queries sees. A frozen dataclass: its fields are the options."""

    @property
    def block(self) -> int:
        """How many tokens are in a block."""

    @property
    def kernel(self) -> str:
        """What runs it: "auto" or a name of `KERNELS`."""

    @property
    def follows_data(self) -> bool:
        """Whether the mask depends on queries and keys, so that two ways over the same steps may have two."""

    def check(self, grid: Grid, num_layers: int) -> None:
        """Raise `UsageError` when the pattern is not for a video of this grid, or a model of so many layers."""

    def layout(self, grid: Grid, tokens: Tensor, text: Tensor) -> Layout:
        """Return the blocks of video `tokens` [T, H, W] and `text` [n], which are indices into the sequence."""

    def choose(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, site: Site) -> Choice:
        """Return the mask for q, k and v [B, H, N * block, D], which are in the order of the layout."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every pattern takes: tokens per block, and the kernel."""

    follows_data: ClassVar[bool] = False
    """Whether the mask depends on queries and keys, so that two ways over the same steps may have two."""
    block: int = 64
    kernel: str = "auto"

    def __post_init__(self) -> None:
        if not (16 <= self.block <= 256 and self.block % 16 == 0):
            raise UsageError(
                f"A block of {self.block} tokens is not legal.", tip="choose a multiple of 16 to 256, best 64 or 128."
            )
        from vgen.attention.kernels import check_block

        check_block(self.kernel, self.block)

    def check(self, grid: Grid, num_layers: int) -> None:
        """Take every grid."""
