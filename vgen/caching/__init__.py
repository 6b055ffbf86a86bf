"""Caches between denoising steps: diffusers' own, put on the model for a video and taken off after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vgen import options
from vgen.caching.first_block import FirstBlock
from vgen.caching.magcache import MagCache
from vgen.caching.skipping import Counter, Skipped
from vgen.caching.taylorseer import TaylorSeer
from vgen.checkpoints import Checkpoint
from vgen.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from vgen.backbones import Backbone


class Cache(Protocol):
    """A way to reuse what a transformer has computed in earlier steps, for the `families` whose blocks allow it.

    `parts` are what it skips, "blocks" or "attention"; with `counts_passes` it takes each pass of the model for a
    step; what `is_inside_blocks` changes what a block computes.
    """

    families: ClassVar[tuple[str, ...]]
    parts: ClassVar[str]
    counts_passes: ClassVar[bool]
    is_inside_blocks: ClassVar[bool]

    def config(self, num_inference_steps: int, dtype: Any) -> Any:
        """Return what diffusers' `enable_cache` takes, for a model of a torch dtype."""


CACHES: dict[str, Callable[..., Cache]] = {
    "first-block": FirstBlock,
    "taylorseer": TaylorSeer,
    "magcache": MagCache,
}

# Caches that diffusers has or people know, and why not here.
REFUSED = {
    "faster-cache": "it wants both branches of guidance in one batch, and here they run in turn, as the models' own "
    "pipelines run them",
    "pyramid": "it has one memory for both branches of guidance, so that one would be given what the other has said",
    "teacache": "diffusers does not have it; first-block goes by the same idea and needs no calibration",
}


@dataclass(kw_only=True)
class Cached:
    """A cache at work: `branch` is entered for each branch of guidance; after the video, `skipped` is filled in."""

    branch: Callable[[str], AbstractContextManager[object]] = nullcontext
    skipped: Skipped | None = None


def parse(text: str) -> Cache:
    """Return the cache that `name` or `name:key=value` means; raise `UsageError` where it means none."""
    name = text.partition(":")[0].strip()
    if name in REFUSED:
        raise UsageError(f'The cache "{name}" cannot be used: {REFUSED[name]}.', tip=f"choose: {', '.join(CACHES)}.")
    return options.parse(text, CACHES, what="cache")()


def check(text: str, checkpoint: Checkpoint, *, sampler: str, is_compiled: bool) -> None:
    """Raise `UsageError` unless a checkpoint can be run with a cache, a sampler and maybe compiled blocks."""
    cache, name = parse(text), text.partition(":")[0].strip()
    if not checkpoint.can.cache or checkpoint.family not in cache.families:
        able = [name for name, known in CACHES.items() if checkpoint.family in known.families]  # type: ignore[attr-defined]
        raise UsageError(
            f'The cache "{name}" does not know the blocks of "{checkpoint.name}" ({checkpoint.family}).',
            tip=f"use {' or '.join(able)}." if checkpoint.can.cache else "leave out --cache.",
        )
    if cache.counts_passes and sampler.partition(":")[0] == "heun":
        raise UsageError(
            f'The cache "{name}" takes every pass of the model for a step, and the sampler "heun" makes two in each.',
            tip="use another sampler, or the cache first-block.",
        )
    if isinstance(cache, MagCache) and checkpoint.can.two_transformers:
        raise UsageError(
            f'The cache "magcache" has ratios of one transformer, and "{checkpoint.name}" has two.',
            tip="use first-block or taylorseer.",
        )
    if cache.is_inside_blocks and is_compiled:
        raise UsageError(
            f'The cache "{name}" works inside of blocks, and --compile makes each of them one piece.',
            tip="leave out one of them, or use the cache first-block.",
        )


@contextmanager
def applied(text: str | None, backbone: Backbone, num_inference_steps: int) -> Iterator[Cached]:
    """Put a cache, if any, on the transformers of a backbone for one video, so that nothing is left for the next."""
    if text is None:
        yield Cached()
        return
    from vgen.backbones.components import transformers_of

    cache, transformers = parse(text), transformers_of(backbone)

    @contextmanager
    def branch(name: str) -> Iterator[None]:
        with ExitStack() as entered:
            for transformer in transformers:
                entered.enter_context(transformer.cache_context(name))
            yield

    cached = Cached(branch=branch)
    counters = [Counter(transformer, _parts(cache, backbone, transformer)) for transformer in transformers]
    try:
        for transformer in transformers:
            transformer.enable_cache(cache.config(num_inference_steps, transformer.dtype))
        yield cached
        if isinstance(cache, MagCache):
            cache.finish(transformers[0])
    finally:
        for transformer, counter in zip(transformers, counters, strict=True):
            if transformer.is_cache_enabled:
                transformer.disable_cache()
            counter.remove()
    calls, runs = sum(counter.calls for counter in counters), sum(counter.runs for counter in counters)
    cached.skipped = Skipped(parts=cache.parts, calls=calls, skipped=calls - runs)


def _parts(cache: Cache, backbone: Backbone, transformer: nn.Module) -> list[nn.Module]:
    """Return the parts of a transformer that a cache skips."""
    own = set(transformer.modules())
    blocks = [block for block in backbone.blocks() if block in own]
    if cache.parts == "blocks":
        return blocks
    attention = [getattr(block, name, None) for block in blocks for name in ("attn", "attn1", "attn2")]
    return [module for module in attention if module is not None]
