"""Blocks of tokens: how a sequence is cut into them, and which of them attend to which."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.errors import VgenError


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """A sequence of L tokens, cut into N blocks of `block` places each.

    `order` [N * block] is the token at each place, -1 where there is none; `sizes` [N] is how many tokens are in each
    block, at its first places. The last `num_text_blocks` hold text. Tokens that are in no block are neither asked nor
    seen: the padding of a prompt.
    """

    block: int
    order: Tensor
    sizes: Tensor
    num_text_blocks: int
    num_tokens: int

    @property
    def num_blocks(self) -> int:
        """N."""
        return len(self.sizes)

    @functools.cached_property
    def is_padded(self) -> Tensor:
        """Bool [N * block], true at places without a token."""
        return self.order < 0

    @functools.cached_property
    def _is_in_order(self) -> bool:
        return torch.equal(self.order[: self.num_tokens], torch.arange(self.num_tokens, device=self.order.device))

    @functools.cached_property
    def _places(self) -> Tensor:
        """The place of each token [L]; one past the last for a token that has none."""
        places = self.order.new_full((self.num_tokens + 1,), len(self.order))
        places[self.order] = torch.arange(len(self.order), device=self.order.device)  # -1 is the entry past the last
        return places[: self.num_tokens]

    def split(self, x: Tensor) -> Tensor:
        """Return x [B, H, L, D] in the order of the blocks, [B, H, N * block, D], 0 at places without a token."""
        if self._is_in_order:
            return torch.nn.functional.pad(x, (0, 0, 0, len(self.order) - self.num_tokens)).contiguous()
        return x.index_select(2, self.order.clamp(min=0)).masked_fill_(self.is_padded[:, None], 0)

    def join(self, x: Tensor) -> Tensor:
        """Return x [B, H, N * block, D] in the order of the tokens, [B, H, L, D], 0 for tokens without a place."""
        if self._is_in_order:
            return x[:, :, : self.num_tokens]
        return torch.nn.functional.pad(x, (0, 0, 0, 1)).index_select(2, self._places)


def cut(groups: Sequence[Tensor], text: Tensor, *, block: int, num_tokens: int) -> Layout:
    """Return the layout of video tokens in `groups`, none of which shares a block with another, and of text behind.

    Each group is the tokens [n] of a frame, a tile or the whole video, in order; `text` is [n] too, and may be empty.
    """
    parts = [*groups, *([text] if len(text) else [])]
    order = torch.cat([torch.nn.functional.pad(part, (0, -len(part) % block), value=-1) for part in parts])
    return Layout(
        block=block,
        order=order,
        sizes=(order >= 0).view(-1, block).sum(1),
        num_text_blocks=-(-len(text) // block),
        num_tokens=num_tokens,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockMask:
    """Which key blocks each query block sees: `kept` bool [B or 1, H or 1, N, N], for blocks of `layout`."""

    kept: Tensor
    layout: Layout

    @functools.cached_property
    def sparsity(self) -> float:
        """The share of the pairs of tokens that is left out, from 0 to 1; pairs with padding do not count."""
        sizes = self.layout.sizes.double()
        pairs = torch.einsum("i,j,bhij->", sizes, sizes, self.kept.double()) / (
            self.kept.shape[0] * self.kept.shape[1]
        )
        return 1 - (pairs / sizes.sum() ** 2).item()

    @functools.cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Return (starts, keys), int32: row r of [B, H, N], flat, sees the blocks keys[starts[r] : starts[r + 1]]."""
        flat = self.kept.flatten(0, 2)
        starts = torch.nn.functional.pad(flat.sum(1).cumsum(0), (1, 0))
        return starts.int(), flat.nonzero()[:, 1].int()

    def check(self) -> None:
        """Raise `VgenError` where a query block sees nothing: the softmax over nothing is not a number."""
        if not bool(self.kept.any(-1).all()):
            raise VgenError("A block of queries would attend to nothing.", tip="lower the sparsity.")


def with_text(video: Tensor, layout: Layout) -> BlockMask:
    """Return the mask of video blocks, bool [..., V, V], with text that sees all and is seen by all."""
    text = layout.num_text_blocks
    kept = torch.nn.functional.pad(video, (0, text, 0, text), value=True)
    mask = BlockMask(kept=kept.view(*(1,) * (4 - kept.ndim), *kept.shape), layout=layout)
    mask.check()
    return mask


def pack(kept: Tensor) -> Tensor:
    """Return bool [..., N] as bits, uint8 [..., ceil(N / 8)]: what is remembered of a mask."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % 8))
    bits = padded.view(*kept.shape[:-1], -1, 8).to(torch.uint8)
    packed: Tensor = (bits << torch.arange(8, device=kept.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return packed


def unpack(bits: Tensor, num_blocks: int) -> Tensor:
    """Return bool [..., N] that `pack` was given."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :num_blocks].bool()
