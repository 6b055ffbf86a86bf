"""The methods by which several GPUs share one video, and what they can share. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vgen import options
from vgen.errors import UsageError

if TYPE_CHECKING:
    from vgen.checkpoints import Checkpoint, Rules


class Method(Protocol):
    """A way to compute attention over tokens that lie on several GPUs."""

    def degrees(self, num_gpus: int) -> tuple[int, int]:
        """Return over how many GPUs heads are spread (Ulysses), and over how many keys and values are (ring).

        Their product is `num_gpus`. Raises `UsageError` where that cannot be.
        """


@dataclass(frozen=True, kw_only=True)
class Ulysses:
    """Exchange tokens for heads: each GPU attends with some of the heads over all tokens (arXiv:2309.14509)."""

    def degrees(self, num_gpus: int) -> tuple[int, int]:
        """Return (num_gpus, 1)."""
        return num_gpus, 1


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Each GPU attends from its own tokens to those of one GPU after the other (arXiv:2310.01889)."""

    def degrees(self, num_gpus: int) -> tuple[int, int]:
        """Return (1, num_gpus)."""
        return 1, num_gpus


@dataclass(frozen=True, kw_only=True)
class Unified:
    """Ulysses in groups of `ulysses_degree` GPUs, and a ring across the groups (arXiv:2405.07719)."""

    ulysses_degree: int = 2

    def degrees(self, num_gpus: int) -> tuple[int, int]:
        """Return (ulysses_degree, num_gpus / ulysses_degree), both of them more than 1."""
        inner = [degree for degree in _divisors(num_gpus) if 1 < degree < num_gpus]
        if self.ulysses_degree not in inner:
            raise UsageError(
                f"{num_gpus} GPUs are not a ring of groups of {self.ulysses_degree}.",
                tip=f"use unified:ulysses_degree={_listed(inner)}." if inner else "use ulysses or ring.",
            )
        return self.ulysses_degree, num_gpus // self.ulysses_degree


METHODS: dict[str, type[Method]] = {"ulysses": Ulysses, "ring": Ring, "unified": Unified}
DEFAULT = "ulysses"


def degrees(method: str, num_gpus: int) -> tuple[int, int]:
    """Return the degrees of Ulysses and ring of a method as the command line writes it, such as "ulysses"."""
    return options.parse(method, METHODS, what="method of context parallelism")().degrees(num_gpus)


def num_tokens(num_frames: int, height: int, width: int, rules: Rules) -> int:
    """Return how many tokens the frames have, for the families that can share them."""
    side = rules.size_multiple
    return ((num_frames - 1) // rules.frame_multiple + 1) * (height // side) * (width // side)


def check(num_gpus: int, method: str, checkpoint: Checkpoint, *, device: str, dtype: str, tokens: int) -> None:
    """Raise `UsageError` unless a checkpoint's video of so many tokens can be made on so many GPUs in this way.

    Whether there are so many is not asked. The number of heads is looked up where the checkpoint is on this machine.
    """
    ulysses, ring = degrees(method, num_gpus)
    if not checkpoint.can.context_parallel:
        raise UsageError(
            f'The model "{checkpoint.name}" runs on one GPU: diffusers cannot share the tokens of the family '
            f'"{checkpoint.family}" among several.',
            tip="leave out --gpus.",
        )
    kind, colon, _ = device.partition(":")
    if kind == "mps" or colon:
        raise UsageError(f"--device {device} is one device, and --gpus asks for {num_gpus}.", tip="use --device cuda.")
    if ring > 1 and (kind == "cpu" or dtype in ("float32", "fp32")):
        raise UsageError(
            f"{method} needs flash attention, which is for GPUs in bfloat16 or float16: other attention does not tell "
            "the log-sum-exp that the parts of a ring are added up by.",
            tip="use --context-parallel ulysses, or a GPU with --dtype bfloat16.",
        )
    if ulysses > 1 and (heads := _num_heads(checkpoint)) is not None and heads % ulysses:
        legal = [degree for degree in _divisors(heads) if degree > 1]
        raise UsageError(
            f'The {heads} heads of "{checkpoint.name}" cannot be spread evenly over {ulysses} GPUs.',
            tip=f"give Ulysses {_listed(legal)}" + ("." if kind == "cpu" else ", or use --context-parallel ring."),
        )
    if tokens < num_gpus or (ulysses > 1 and ring > 1 and tokens % num_gpus):
        raise UsageError(
            f"The video's {tokens} tokens cannot be shared by {num_gpus} GPUs with {method}.",
            tip="use ulysses or ring, whose parts may differ in length."
            if tokens >= num_gpus
            else "use fewer --gpus.",
        )


def _num_heads(checkpoint: Checkpoint) -> int | None:
    """Return the number of attention heads; None where the transformer's configuration is not on this machine."""
    if checkpoint.folder is None:
        return None
    try:
        config = json.loads((checkpoint.folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    heads = config.get("num_attention_heads")
    return heads if isinstance(heads, int) else None


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _listed(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
