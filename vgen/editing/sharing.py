"""RF-Edit's feature sharing: V of the late blocks' self-attention, from the inversion to the denoising of an edit.

Wang et al. 2024 (arXiv:2411.04746): V is stored in the last steps of the inversion, nearest the noise, and takes the
place of the model's own in the first steps of denoising. It is applied to an unmodified model from outside, by hooks
on the projections that make V, so that it goes with any processor of the attention slots.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.sampling.flow import Sampler, Velocity
from vgen.sampling.inversion import evaluations

if TYPE_CHECKING:
    from vgen.backbones import Backbone, Shot

# Which evaluation of a velocity: the interval of the grid, counted from the noise, and how many evaluations of its
# step come after it; or by time the sigma, and 0.
Key = tuple[float, int]
SAME_SIGMA = 6  # decimals to which two ways to the middle of an interval agree


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which features are stored and read, evaluation by evaluation; None where an evaluation does neither.

    `after` are those that the inversion passes no evaluation of: stored by one more, where it ends.
    """

    store: tuple[Key | None, ...]
    after: tuple[Key, ...]
    read: tuple[Key | None, ...]

    @property
    def num_features(self) -> int:
        """How many evaluations are stored."""
        return len({key for key in self.read if key is not None})


def schedule(solver: Sampler, sigmas: Tensor, *, num_steps: int, by: str) -> Schedule:
    """Return what to store while `solver` inverts and to read in the first `num_steps` steps of denoising.

    sigmas [N + 1], falling. By "interval", as released: both evaluations of a step of RF-Solver find those of the step
    over the same interval, so that the endpoints are at its two ends. By "time": each finds the one at its own sigma.
    """

    def key(interval: int, sigma: float, after: int) -> Key:
        return (interval, after) if by == "interval" else (round(sigma, SAME_SIGMA), 0)

    def keys(grid: Tensor, intervals: range) -> list[tuple[int, Key]]:
        return [
            (interval, key(interval, sigma, len(step) - 1 - place))
            for interval, step in zip(intervals, evaluations(solver, grid), strict=True)
            for place, sigma in enumerate(step)
        ]

    intervals = range(len(sigmas) - 1)
    reading = [found if interval < num_steps else None for interval, found in keys(sigmas, intervals)]
    wanted = {found for found in reading if found is not None}
    passed = [found if found in wanted else None for _, found in keys(sigmas.flip(0), intervals[::-1])]
    missing = [found for found in dict.fromkeys(reading) if found is not None and found not in passed]
    return Schedule(store=tuple(passed), after=tuple(missing), read=tuple(reading))


def label(key: Key) -> str:
    """Return what the names of an evaluation's features begin with."""
    return f"{key[0]:.{SAME_SIGMA}g}-{key[1]}"


def sites(backbone: Backbone, begin: float, end: float) -> dict[str, nn.Module]:
    """Return the projections that make V in the blocks from depth `begin` to `end`, shares of all, by name.

    At least one block. Of two transformers the same blocks of each are one site under two names, which share features.
    """
    slots = backbone.attention_slots()
    depth = len(slots) // 2 if backbone.checkpoint.can.two_transformers else len(slots)
    first = min(math.ceil(begin * depth), depth - 1)
    found: dict[str, nn.Module] = {}
    for place, slot in enumerate(slots):
        block = place % depth
        if first <= block < max(math.ceil(end * depth), first + 1):
            for name in ("to_v", "add_v_proj"):
                if (projection := getattr(slot, name, None)) is not None:
                    found[f"{block}.{name}{'' if place < depth else '.2'}"] = projection
    return found


def num_bytes(backbone: Backbone, shot: Shot, found: dict[str, nn.Module], plan: Schedule, itemsize: int) -> int:
    """Return what the store will hold, `itemsize` bytes a number: every V of the tokens of video and text."""
    video = math.prod(backbone.token_grid(shot.num_frames, shot.height, shot.width))
    text = backbone.num_text_tokens()
    total = 0
    for name, projection in found.items():
        if name.endswith(".2"):
            continue
        # With a projection of its own for the text, the two are apart.
        apart = name.replace("to_v", "add_v_proj") in found
        tokens = text if "add_v_proj" in name else video if apart else video + text
        total += tokens * int(getattr(projection, "out_features"))  # noqa: B009 - an nn.Module says Tensor or Module
    return total * plan.num_features * itemsize


class Store(Protocol):
    """Features by name; `num_bytes` is what they take."""

    num_bytes: int

    def put(self, name: str, value: Tensor) -> None:
        """Keep a tensor."""

    def get(self, name: str) -> Tensor | None:
        """Return a tensor that was kept; None for another name."""

    def names(self) -> list[str]:
        """Return the names of all that is kept."""

    def close(self) -> None:
        """Give back what it takes."""


class Memory:
    """Features in main memory, as they are or in half precision."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.values: dict[str, Tensor] = {}
        self.num_bytes = 0
        self._dtype = dtype

    def put(self, name: str, value: Tensor) -> None:
        """Keep a copy."""
        self.values[name] = value.detach().to("cpu", self._dtype or value.dtype, copy=True)
        self.num_bytes += self.values[name].nbytes

    def get(self, name: str) -> Tensor | None:
        """Return the copy."""
        return self.values.get(name)

    def names(self) -> list[str]:
        """Return the names of all that is kept."""
        return list(self.values)

    def close(self) -> None:
        """Forget everything."""
        self.values.clear()


class Disk:
    """Features in files, one each, in a folder beside the output that goes when the store is closed."""

    def __init__(self, beside: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(dir=beside, prefix=".vgen-features-")
        self.num_bytes = 0

    def put(self, name: str, value: Tensor) -> None:
        """Write a file. Raises `VgenError` where the disk is full."""
        from vgen.files import not_written

        path = self._path(name)
        try:
            save_file({"value": value.detach().contiguous().cpu()}, path)
        except OSError as error:
            raise not_written(path, error) from error
        self.num_bytes += value.nbytes

    def get(self, name: str) -> Tensor | None:
        """Read a file."""
        path = self._path(name)
        return load_file(path)["value"] if path.exists() else None

    def names(self) -> list[str]:
        """Return the names of all that is kept."""
        return sorted(file.stem for file in Path(self._folder.name).iterdir())

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()

    def _path(self, name: str) -> Path:
        return Path(self._folder.name, f"{name}.safetensors")


# Where features are kept. bfloat16 has the range of float32, which V may need.
STORES: dict[str, Any] = {
    "ram": lambda beside: Memory(),
    "half": lambda beside: Memory(torch.bfloat16),
    "disk": Disk,
}


class Sharing:
    """Features on their way from one pass to the other; `reads` and `hits` count what was asked for and found."""

    def __init__(self, found: dict[str, nn.Module], plan: Schedule, store: Store) -> None:
        self.sites, self.schedule, self.store = found, plan, store
        self.reads = self.hits = 0

    def storing(self, velocity: Velocity) -> Velocity:
        """Return a velocity whose evaluations are those of an inversion, and fill the store."""
        return self._following(velocity, self.schedule.store, storing=True)

    def reading(self, velocity: Velocity) -> Velocity:
        """Return a velocity whose evaluations are those of denoising, and take V out of the store.

        All branches of guidance take it.
        """
        return self._following(velocity, self.schedule.read, storing=False)

    def finish(self, velocity: Velocity, latents: Tensor, sigma: Tensor) -> None:
        """Store what the inversion passed no evaluation of, at the latents and the sigma where it ended."""
        for key in self.schedule.after:
            with self._attached(key, storing=True):
                velocity(latents, sigma)

    def _following(self, velocity: Velocity, keys: Sequence[Key | None], *, storing: bool) -> Velocity:
        remaining = iter(keys)

        def evaluate(latents: Tensor, sigma: Tensor) -> Tensor:
            key = next(remaining)
            if key is None:
                return velocity(latents, sigma)
            with self._attached(key, storing=storing):
                return velocity(latents, sigma)

        return evaluate

    @contextmanager
    def _attached(self, key: Key, *, storing: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for name, projection in self.sites.items():
                entry = f"{label(key)}-{name.removesuffix('.2')}"
                hook = partial(self._store if storing else self._read, entry)
                stack.callback(projection.register_forward_hook(hook).remove)
            yield

    def _store(self, entry: str, module: nn.Module, inputs: tuple[Any, ...], value: Tensor) -> None:
        self.store.put(entry, value)

    def _read(self, entry: str, module: nn.Module, inputs: tuple[Any, ...], value: Tensor) -> Tensor | None:
        self.reads += 1
        stored = self.store.get(entry)
        if stored is None:
            return None
        if stored.shape != value.shape:
            raise VgenError(
                f"The inversion's features are {list(stored.shape)}, but {list(value.shape)} are needed.",
                tip="invert the clip with this model at this size and length.",
            )
        self.hits += 1
        return stored.to(value.device, value.dtype)
