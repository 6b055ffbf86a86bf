"""What layers see while a model makes videos: the largest value of every channel, and a sample of tokens.

Kept apart for ranges of noise levels and for the branches of guidance, since both change what channels hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vgen.backbones import Shot, TextCondition
from vgen.quantization import layers
from vgen.quantization.layers import Layer

if TYPE_CHECKING:
    from vgen.backbones import Backbone

RANGES = 4  # of the noise levels, equally wide, the noisiest first
BRANCHES = ("conditional", "unconditional")
TOKENS = 128  # per layer, range and branch
TOKENS_PER_CALL = 16  # of which they are drawn
CHECKED = 8  # of so many tokens one is for the error of a layer's outputs, the others to round its weights by


@dataclass(frozen=True, kw_only=True)
class Call:
    """One evaluation of the model, to be repeated: the arguments of `Backbone.velocity` by position and by name."""

    range: int
    branch: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(kw_only=True)
class Statistics:
    """What was seen so far. Memory does not grow with the number of videos.

    `maxima` has float32 [RANGES, BRANCHES, K] per layer's path, `tokens` up to [TOKENS, K] per path, range and branch,
    of the `num_seen` [RANGES, BRANCHES] that they were drawn from, and `calls` one evaluation per range and branch.
    """

    maxima: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, dict[tuple[int, int], Tensor]] = field(default_factory=dict)
    num_seen: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[tuple[int, int], Call] = field(default_factory=dict)
    num_evaluations: int = 0

    def act_max(self, layer: Layer) -> Tensor:
        """Return the largest value of each input of a layer, in any range and branch, [K]."""
        return self.maxima[layer.path].amax((0, 1))

    def see(self, layer: Layer, x: Tensor, range_: int, branch: int) -> None:
        """Take inputs [..., K] into account."""
        rows = x.detach().reshape(-1, x.shape[-1])
        maxima = self.maxima.setdefault(layer.path, torch.zeros(RANGES, len(BRANCHES), x.shape[-1]))
        largest = rows.abs().amax(0).float().cpu()
        maxima[range_, branch] = torch.maximum(maxima[range_, branch], largest)
        num_seen = self.num_seen.setdefault(layer.path, torch.zeros(RANGES, len(BRANCHES), dtype=torch.int64))
        before = int(num_seen[range_, branch])
        # Copies: a view would keep all of the layer's inputs in memory.
        drawn = rows[:: -(-len(rows) // TOKENS_PER_CALL)].cpu().clone()
        tokens = self.tokens.setdefault(layer.path, {})
        tokens[range_, branch] = _sample(tokens.get((range_, branch), drawn[:0]), drawn, before)
        num_seen[range_, branch] += len(drawn)

    def tokens_to_round_by(self, layer: Layer) -> Tensor | None:
        """Return finite inputs [T, K] of a layer, of all ranges and branches, to round its weights by, if any."""
        seen = [tokens[torch.arange(len(tokens)) % CHECKED > 0] for tokens in self.tokens.get(layer.path, {}).values()]
        tokens = torch.cat(seen) if seen else torch.empty(0, layer.in_features)
        tokens = tokens[tokens.isfinite().all(-1)]
        return tokens if len(tokens) else None

    def tokens_to_check(self, layer: Layer) -> dict[tuple[int, int], Tensor]:
        """Return other inputs of a layer, [T, K] per range and branch, for the error of its outputs."""
        return {key: tokens[::CHECKED] for key, tokens in self.tokens.get(layer.path, {}).items()}

    def save(self, path: Path, num_videos: int) -> None:
        """Write what was seen in so many videos, but for `calls`, which only a backbone can make again."""
        from safetensors.torch import save

        tensors = {f"maxima/{layer}": maxima for layer, maxima in self.maxima.items()}
        tensors |= {f"num_seen/{layer}": num_seen for layer, num_seen in self.num_seen.items()}
        for layer, seen in self.tokens.items():
            tensors |= {f"tokens/{layer}/{range_}/{branch}": rows for (range_, branch), rows in seen.items()}
        told = {"num_evaluations": str(self.num_evaluations), "num_videos": str(num_videos)}
        path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, told))

    @classmethod
    def load(cls, path: Path) -> tuple[Statistics, int]:
        """Return what `save` wrote, and the number of videos."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as stored:
            told = stored.metadata()
            found = cls(num_evaluations=int(told["num_evaluations"]))
            for name in stored.keys():  # noqa: SIM118
                kind, layer, *key = name.split("/")
                if kind in ("maxima", "num_seen"):
                    getattr(found, kind)[layer] = stored.get_tensor(name).clone()
                else:
                    found.tokens.setdefault(layer, {})[int(key[0]), int(key[1])] = stored.get_tensor(name)
        return found, int(told["num_videos"])


class Observed:
    """A backbone that tells statistics what its layers see, and makes no frames: calibration needs latents alone."""

    def __init__(self, backbone: Backbone, statistics: Statistics) -> None:
        self.backbone = backbone
        self.statistics = statistics
        self.range_, self.branch = 0, 0
        self.conditional: list[TextCondition] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)

    def encode_prompt(self, prompts: Sequence[str], images: Any = None) -> list[TextCondition]:
        """Return the backbone's texts; the first of a generation are the conditional branch."""
        texts = self.backbone.encode_prompt(prompts, images)
        if not self.conditional:
            self.conditional = texts
        return texts

    def velocity(self, latents: Tensor, sigma: Tensor, text: TextCondition, *rest: Any, **options: Any) -> Tensor:
        """Return the backbone's velocity, with range and branch noted for the hooks."""
        self.range_ = range_of(float(sigma))
        self.branch = 0 if any(text is own for own in self.conditional) else 1
        self.statistics.num_evaluations += 1
        call = Call(
            range=self.range_, branch=self.branch, arguments=(latents.clone(), sigma, text, *rest), options=options
        )
        self.statistics.calls.setdefault((self.range_, self.branch), call)
        return self.backbone.velocity(latents, sigma, text, *rest, **options)

    def decode(self, latents: Tensor, shot: Shot) -> Tensor:
        """Return black frames."""
        return torch.zeros(1, shot.num_frames, shot.height, shot.width, 3, dtype=torch.uint8)

    def decode_sound(self, latents: Tensor, shot: Shot) -> None:
        """Return None."""


def _sample(tokens: Tensor, drawn: Tensor, num_before: int) -> Tensor:
    """Return up to TOKENS of [T, K] and [D, K]; of all that ever were drawn, each is there with the same chance."""
    room = max(0, TOKENS - len(tokens))
    tokens = torch.cat([tokens, drawn[:room]])
    generator = torch.Generator().manual_seed(num_before)
    for number, token in enumerate(drawn[room:], start=num_before + room):
        place = int(torch.randint(number + 1, (1,), generator=generator))
        if place < TOKENS:
            tokens[place] = token
    return tokens


def range_of(sigma: float) -> int:
    """Return which range a noise level from 1 to 0 is in, counted from the noisiest."""
    return min(RANGES - 1, max(0, int((1 - sigma) * RANGES)))


@contextmanager
def observing(backbone: Backbone, watched: Sequence[Layer], statistics: Statistics) -> Iterator[Observed]:
    """Yield the backbone with layers watched, for one generation."""
    observed = Observed(backbone, statistics)

    def hook(layer: Layer) -> Any:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            statistics.see(layer, inputs[0], observed.range_, observed.branch)

        return see

    handles = [layers.linear(backbone, layer).register_forward_pre_hook(hook(layer)) for layer in watched]
    try:
        yield observed
    finally:
        for handle in handles:
            handle.remove()
