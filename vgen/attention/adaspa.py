"""AdaSpa (arXiv:2502.21079): where the attention lies is looked up once or twice in a run, and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vgen.attention.patterns import Choice, Grid, Options, Site
from vgen.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.attention.blocks import BlockMask, Layout

# Heads that recall more of their attention than this can spare some of their blocks for others (section 4.3).
RECALL_TO_SPARE = 0.8


@dataclass(frozen=True, kw_only=True)
class AdaSpa(Options):
    """The blocks with most attention, as many for each row of a head, for every layer, head and branch of guidance.

    `sparsity` is the share of the blocks that is left out. The first share `warmup` of the steps is dense, and so is
    the step after them, which searches; `search` has the shares of the steps at which is searched, joined by +. The
    defaults are the paper's: with 50 steps, those with the numbers 10 and 30. With `adaptive`, heads whose attention
    is easily recalled give half of their blocks to those whose is not, as many as gain.
    """

    follows_data: ClassVar[bool] = True
    sparsity: float = 0.8
    warmup: float = 0.2
    search: str = "0.2+0.6"
    adaptive: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        lowest = 1 / 3 if self.adaptive else 0
        if not lowest <= self.sparsity < 1:
            raise UsageError(
                f"A sparsity of {self.sparsity:g} is not legal.",
                tip=f"choose from {'0.34' if self.adaptive else '0'} to less than 1"
                + ("; below, adaptive=false is needed." if self.adaptive else "."),
            )
        if not 0 <= self.warmup <= 1:
            raise UsageError(
                f"A warm-up of {self.warmup:g} is not legal: it is a share of the steps.", tip="choose from 0 to 1."
            )
        self.search_shares()

    def search_shares(self) -> list[float]:
        """Return `search` as numbers. Raises `UsageError`."""
        try:
            shares = sorted(float(share) for share in self.search.split("+"))
        except ValueError:
            shares = [-1.0]
        if not 0 <= shares[0] <= shares[-1] < 1:
            raise UsageError(
                f'Cannot read search="{self.search}": shares of the steps, joined by +, are expected.',
                tip="write search=0.2+0.6: with 50 steps, those with the numbers 10 and 30.",
            )
        return shares

    def layout(self, grid: Grid, tokens: Tensor, text: Tensor) -> Layout:
        """Return blocks of tokens as they come."""
        from vgen.attention.blocks import cut

        return cut([tokens.flatten()], text, block=self.block, num_tokens=tokens.numel() + len(text))

    def choose(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, site: Site) -> Choice:
        """Return dense attention in the warm-up, then the mask of the last search.

        A search that a cache skipped is made up for at the next step that runs.
        """
        from vgen.attention.blocks import BlockMask, pack, unpack

        warmup = round(self.warmup * site.num_steps)
        searches = [round(share * site.num_steps) for share in self.search_shares()]
        due = max([step for step in searches if step <= site.step], default=0)
        memory = site.memory
        if site.step < warmup:
            return Choice()
        if "mask" not in memory:
            output, memory["lse"] = dense_with_lse(q, k, v, layout, site.scale)
            mask = self.search_mask(q, k, layout, site, memory["lse"])
            memory.update(mask=pack(mask.kept), searched=site.step)
            return Choice(output=output)
        if memory["searched"] < due:
            mask = self.search_mask(q, k, layout, site, memory["lse"])
            memory.update(mask=pack(mask.kept), searched=site.step)
            return Choice(mask=mask)
        return Choice(mask=BlockMask(kept=unpack(memory["mask"], layout.num_blocks), layout=layout))

    def search_mask(self, q: Tensor, k: Tensor, layout: Layout, site: Site, lse: Tensor) -> BlockMask:
        """Return the mask for q and k, by the mass of their blocks."""
        from vgen.attention import kernels

        kernel = kernels.choose(self.kernel, str(q.device), self.block)
        mass = kernels.search(kernel, q, k, layout, site.scale, lse)
        return select(mass, layout, self.sparsity, adaptive=self.adaptive, num_heads=site.num_heads)


def dense_with_lse(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """Return dense attention [B, H, N * block, D] and the logarithm of each row's sum of exponentials, float32.

    The first pass of the fused online search. torch's flash kernels give both at once; they need keys without holes,
    so the padding is left out of them.
    """
    import torch

    seen = ~layout.is_padded
    whole = bool(seen.all())
    keys, values = (k, v) if whole else (k[:, :, seen], v[:, :, seen])
    if q.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, scale=scale)
        return found[0], found[1].float()
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, keys, values, scale=scale)
        return found[0], found[1].float()
    parts = torch.split(q, layout.block, dim=2)
    lse = torch.cat([(rows @ keys.mT).float().mul_(scale).logsumexp(-1) for rows in parts], -1)
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, scale=scale), lse


def select(
    mass: Tensor, layout: Layout, sparsity: float, *, adaptive: bool = True, num_heads: int | None = None
) -> BlockMask:
    """Return the mask of the blocks with most attention, for the mass [B, H, N, N] of all blocks.

    Each row of a head has as many; `adaptive` moves blocks between heads and leaves their mean as it is. Where several
    processes hold the `num_heads` of a layer together, which heads spare blocks is agreed on among all.
    """
    import torch

    from vgen.attention.blocks import with_text
    from vgen.attention.mass import recall

    video = layout.num_blocks - layout.num_text_blocks
    found = mass[..., :video, :video]
    most = max(1, round((1 - sparsity) * video))
    ranked = found.argsort(dim=-1, descending=True)

    def kept(count: Tensor) -> Tensor:
        """Return the best `count` [B, H] blocks of each row."""
        chosen = torch.arange(video, device=mass.device) < count[..., None, None]
        return torch.zeros_like(found, dtype=torch.bool).scatter_(-1, ranked, chosen.expand_as(ranked))

    count = torch.full(mass.shape[:2], most, device=mass.device)
    mask = with_text(kept(count), layout)
    spared = min(round((1 - sparsity) / 2 * video), most - 1, video - most)
    if not adaptive or spared == 0:
        return mask
    recalls = recall(mask, mass)
    others = _gathered(recalls, num_heads or mass.shape[1])
    order = others.argsort(dim=-1)
    easy = (others > RECALL_TO_SPARE).sum(-1, keepdim=True).clamp(max=others.shape[-1] // 2)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    change = torch.where(rank < easy, spared, torch.where(rank >= others.shape[-1] - easy, -spared, 0))
    return with_text(kept(count + _own(change, mass.shape[1])), layout)


def _gathered(recalls: Tensor, num_heads: int) -> Tensor:
    """Return the recalls [B, num_heads] of all processes for those [B, H] of this one."""
    import torch

    if recalls.shape[1] == num_heads:
        return recalls
    parts = [torch.empty_like(recalls) for _ in range(num_heads // recalls.shape[1])]
    torch.distributed.all_gather(parts, recalls.contiguous())
    return torch.cat(parts, dim=1)


def _own(values: Tensor, num_heads: int) -> Tensor:
    """Return this process's part [B, H] of values for all heads."""
    import torch

    if values.shape[1] == num_heads:
        return values
    first = torch.distributed.get_rank() * num_heads
    return values[:, first : first + num_heads]
