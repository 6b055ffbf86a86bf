"""Sparse attention in a backbone: a pattern and a kernel in the place of torch's attention, while a video is made."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from vgen.attention import PATTERNS, kernels
from vgen.attention.dense import Dense
from vgen.attention.mass import block_mass, recall
from vgen.attention.patterns import Grid, Pattern, Site
from vgen.errors import VgenError
from vgen.runtime import synchronize

if TYPE_CHECKING:
    from vgen.attention.blocks import BlockMask, Layout
    from vgen.backbones import Backbone
    from vgen.sampling.flow import OnStep

HOOK = "vgen_sparse_attention"


@dataclass
class Account:
    """What self-attention did in a run: pairs of tokens for each layer, calls, and seconds.

    `kept` and `pairs` count the pairs that were computed and that there are; `recalls` is the mean over heads of the
    attention that the masks kept, where it was measured, and `measuring` the seconds that measuring took.
    """

    kept: list[float]
    pairs: list[float]
    sparse_kept: float = 0.0
    sparse_pairs: float = 0.0
    calls: int = 0
    sparse_calls: int = 0
    seconds: float = 0.0
    measuring: float = 0.0
    recalls: dict[int, list[float]] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """The share of all pairs that was left out, dense steps and all."""
        return 1 - sum(self.kept) / sum(self.pairs) if sum(self.pairs) else 0.0

    @property
    def sparsity_when_sparse(self) -> float:
        """The share that was left out where a mask was used."""
        return 1 - self.sparse_kept / self.sparse_pairs if self.sparse_pairs else 0.0


# What looks at an attention as it happens: q, k, v and the output [B, H, L, D] in the order of tokens, what lays them
# out for a pattern, and the site.
Look = Callable[[Tensor, Tensor, Tensor, Tensor, Callable[[Pattern], "Layout"], Site], None]


class SparseAttention:
    """A pattern run by a kernel in every self-attention of a backbone, for one video of a token grid.

    The model is not changed: while `attached`, a hook on each of `attention_slots` puts `_attend` in the place of the
    one call of torch's `scaled_dot_product_attention` inside, after projections, norms and rotary positions. So the
    families' own processors stay, and under Ulysses' context parallelism it gets whole sequences and a part of the
    heads. Raises `UsageError` for a pattern that is not for this grid, and `VgenError` for a kernel that cannot run.
    """

    def __init__(self, pattern: Pattern, backbone: Backbone, grid: Grid) -> None:
        self.pattern, self.backbone, self.grid = pattern, backbone, grid
        self.slots = backbone.attention_slots()
        pattern.check(grid, len(self.slots))
        self.kernel = kernels.choose(pattern.kernel, backbone.runtime.device, pattern.block)
        self.bound = "torch" if pattern == Dense(block=pattern.block) else kernels.bound(self.kernel)
        self._kernel = kernels.load(self.kernel)
        self.account = Account(kept=[0.0] * len(self.slots), pairs=[0.0] * len(self.slots))
        self.measured_steps: frozenset[int] = frozenset()
        self.look: Look | None = None
        self.begin(1)

    def begin(self, num_steps: int) -> None:
        """Forget what was remembered: a new video, or a new window of one, begins."""
        self.num_steps = num_steps
        self.step = 0
        self._branch = 0
        self._texts: list[Any] = []
        self._memories: dict[tuple[int, int], dict[str, Any]] = {}
        self._shared: dict[Any, Any] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Be in the backbone for as long as this lasts, also when it fails."""
        registries = [HookRegistry.check_if_exists_or_initialize(slot) for slot in self.slots]
        try:
            for layer, registry in enumerate(registries):
                registry.register_hook(_Hook(self, layer), HOOK)
            yield
        finally:
            for registry in registries:
                registry.remove_hook(HOOK, recurse=False)

    def branching(self, velocity: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a velocity (latents, sigma, text) that tells the branches of guidance apart by their text."""

        def told(latents: Tensor, sigma: Tensor, text: Any) -> Tensor:
            if not any(known is text for known in self._texts):
                self._texts.append(text)
            self._branch = next(i for i, known in enumerate(self._texts) if known is text)
            return velocity(latents, sigma, text)

        return told

    def counting(self, on_step: OnStep | None) -> OnStep:
        """Return what counts steps, and calls `on_step` if there is one."""

        def count(step: int, num_steps: int) -> None:
            self.step = step
            if on_step is not None:
                on_step(step, num_steps)

        return count

    def to_dict(self) -> dict[str, Any]:
        """Return what was asked for, what ran and what it left out, for the manifest."""
        account = self.account
        name = next(name for name, kind in PATTERNS.items() if type(self.pattern) is kind)
        return {
            "pattern": name,
            "options": {key.rstrip("_"): value for key, value in asdict(self.pattern).items()},  # type: ignore[call-overload]
            "kernel": self.bound,
            "sparsity": round(account.sparsity, 4),
            "sparsity_when_sparse": round(account.sparsity_when_sparse, 4),
            "calls": account.calls,
            "sparse_calls": account.sparse_calls,
            "layers": [round(1 - kept / pairs, 4) if pairs else 0.0 for kept, pairs in self._per_layer()],
        }

    def _per_layer(self) -> list[tuple[float, float]]:
        return list(zip(self.account.kept, self.account.pairs, strict=True))

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                enable_gqa: bool = False) -> Tensor:  # fmt: skip
        """Return what `scaled_dot_product_attention` would, as far as the pattern wants it: [B, H, L, D]."""
        assert dropout_p == 0 and not is_causal and not enable_gqa
        start = self._now()
        site = self._site(layer, query, scale)
        layout = self._layout(self.pattern, query, key, attn_mask)
        parts = [layout.split(x) for x in (query, key, value)]
        choice = self.pattern.choose(*parts, layout, site)  # type: ignore[call-arg, arg-type]
        if choice.mask is not None:
            out = layout.join(self._kernel.attend(*parts, choice.mask, site.scale))
        elif choice.output is not None:
            out = layout.join(choice.output)
        else:
            out = scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)
        self.account.seconds += self._now() - start
        self._count(layer, layout, choice.mask)
        start = self._now()
        if choice.mask is not None and site.step in self.measured_steps:
            found = recall(choice.mask, block_mass(parts[0], parts[1], layout, site.scale)).mean().item()
            self.account.recalls.setdefault(layer, []).append(found)
        if self.look is not None:
            lay_out = functools.partial(self._layout, query=query, key=key, attn_mask=attn_mask)
            self.look(query, key, value, out, lay_out, site)
        self.account.measuring += self._now() - start
        return out

    def _site(self, layer: int, query: Tensor, scale: float | None) -> Site:
        slot: Any = self.slots[layer]
        return Site(
            layer=layer,
            num_layers=len(self.slots),
            step=min(self.step, self.num_steps - 1),
            num_steps=self.num_steps,
            branch=self._branch,
            grid=self.grid,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            num_heads=max(query.shape[1], int(getattr(slot, "heads", 0))),
            memory=self._memories.setdefault((layer, self._branch), {}),
            shared=self._shared,
        )

    def _layout(self, pattern: Pattern, query: Tensor, key: Tensor, attn_mask: Tensor | None) -> Layout:
        """Return a pattern's blocks of the video's tokens and of text before or behind them, less what is masked."""
        length, num_video = query.shape[2], self.grid[0] * self.grid[1] * self.grid[2]
        num_text = length - num_video
        if key.shape[2] != length or num_text < 0 or (num_text and not self.backbone.num_text_tokens()):
            raise VgenError(
                f"Sparse attention expects {num_video} video tokens at once, but this attention has {length} queries "
                f"and {key.shape[2]} keys.",
                tip="it goes with ulysses, which shares heads among GPUs, not with ring, which shares tokens.",
            )
        cached = ("layout", pattern, length, self._branch if attn_mask is not None else None)
        if cached not in self._shared:
            first = num_text if self.backbone.text_comes_first else 0
            video = torch.arange(first, first + num_video).view(self.grid)
            text = torch.arange(0, num_text) if first else torch.arange(num_video, length)
            if attn_mask is not None:
                text = text[_seen(attn_mask, length)[text]]
            layout = pattern.layout(self.grid, video.to(query.device), text.to(query.device))
            self._shared[cached] = _of_length(layout, length)
        found: Layout = self._shared[cached]
        return found

    def _count(self, layer: int, layout: Layout, mask: BlockMask | None) -> None:
        pairs = float(layout.sizes.sum()) ** 2
        kept = pairs if mask is None else pairs * (1 - mask.sparsity)
        account = self.account
        account.calls += 1
        account.pairs[layer] += pairs
        account.kept[layer] += kept
        if mask is not None:
            account.sparse_calls += 1
            account.sparse_pairs += pairs
            account.sparse_kept += kept

    def _now(self) -> float:
        if self.measured_steps:  # who compares waits for the device; who only makes a video does not
            synchronize(self.backbone.runtime)
        return time.perf_counter()


def _seen(attn_mask: Tensor, length: int) -> Tensor:
    """Return which keys some query sees, bool [L] on the CPU, of a mask [B, 1, 1 or L, L] that all videos share."""
    if attn_mask.dtype != torch.bool:
        raise VgenError("Sparse attention does not go with a bias on attention.", tip="leave out --attention.")
    seen = attn_mask.reshape(-1, attn_mask.shape[-2], length).any(1)
    if not bool((seen == seen[:1]).all()):
        raise VgenError("Sparse attention takes prompts of one length in a batch.", tip="make one video at a time.")
    return seen[0].cpu()


def _of_length(layout: Layout, length: int) -> Layout:
    """Return a layout for a sequence that has tokens besides: masked ones, which are in no block."""
    return layout if layout.num_tokens == length else replace(layout, num_tokens=length)


class _Hook(ModelHook):  # type: ignore[misc]
    """Puts sparse attention in the place of torch's inside one attention module."""

    def __init__(self, attention: SparseAttention, layer: int) -> None:
        super().__init__()
        self.attention, self.layer = attention, layer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _InPlace(self.attention, self.layer) as mode:
            output = self.fn_ref.original_forward(*args, **kwargs)
        if mode.calls != 1:
            raise VgenError(
                f"The self-attention of layer {self.layer} called torch's attention {mode.calls} times instead of "
                "once, so that --attention has no place in it.",
                tip="leave out --attention, or choose torch's own attention backend.",
            )
        return output


class _InPlace(TorchFunctionMode):
    """Calls sparse attention for every `scaled_dot_product_attention`, and counts."""

    def __init__(self, attention: SparseAttention, layer: int) -> None:
        super().__init__()
        self.attention, self.layer, self.calls = attention, layer, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.attention._attend(self.layer, *args, **(kwargs or {}))
