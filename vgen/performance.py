"""How a model is fitted to a machine: what is offloaded, tiled and compiled, by what it needs and what is free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from vgen import runtime
from vgen.checkpoints import Checkpoint
from vgen.errors import UsageError, did_you_mean
from vgen.offloading import OFFLOADS
from vgen.runtime import Memory

PERFORMANCES = ("auto", "speed", "memory")

# The part of the free memory that weights may take, where nobody has reported what a whole run does. The rest is for
# what is computed, which grows with the video; "speed" leaves less.
WEIGHTS_SHARE = {"auto": 0.7, "speed": 0.85}

# Weights of fewer 10^9 bytes fit everywhere: for them no GPU is asked, which would cost the start of torch.
SMALL_GB = 2.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was chosen for a run. `offload` is None where it is chosen later, as the checkpoint is not known well yet.

    `notes` say in sentences what was chosen and why, where there was something to choose.
    """

    offload: str | None
    tiling: bool
    compile: bool
    dtype: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as values that JSON can hold."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def settle(
    checkpoint: Checkpoint,
    *,
    performance: str = "auto",
    offload: str = "auto",
    compiled: bool | None = None,
    device: str = "auto",
    dtype: str = "auto",
    gpu_memory: Callable[[str], Memory | None] = runtime.gpu_memory,
    main_memory: Callable[[], Memory] = lambda: runtime.memory("cpu"),
) -> Settings:
    """Return the settings for a checkpoint on a device; what is asked for by name wins over the `performance`.

    `gpu_memory` is what a device name has, None where it is no GPU with a memory of its own. Raises `UsageError` for
    unknown names, for offloading where there is nothing to offload from, and for compiling where that cannot be.
    """
    _check_name("performance", performance, PERFORMANCES)
    _check_name("offload", offload, ("auto", *OFFLOADS))
    if performance == "memory" and dtype == "auto":
        dtype = "bfloat16"
    weights = _weights_gb(checkpoint, dtype)
    is_small = weights is not None and weights[0] < SMALL_GB
    is_asked = performance != "auto" or offload in ("model", "group")
    gpu = gpu_memory(device) if is_asked or not is_small else None
    notes: list[str] = []
    if offload in ("model", "group") and gpu is None:
        raise UsageError(
            f'"{offload}" offloading moves weights between the main memory and that of a GPU, and '
            f"{_without_gpu(device)}.",
            tip="leave out --offload; --performance memory saves memory on any device.",
        )
    chosen: str | None = offload
    if offload == "auto":
        chosen, why = _offload(checkpoint, weights, gpu, performance=performance, is_small=is_small)
        notes += why
    if gpu is None and weights is not None and not is_small and weights[0] * 1e9 > main_memory().free:
        free = main_memory().free / 1e9
        notes.append(f"Warning: the weights take {weights[0]:.1f} GB, and {free:.1f} GB of main memory are free.")
    tiling = performance == "memory"
    if tiling:
        notes.append("To save memory, the video is decoded in tiles, which changes it a little where they meet.")
        notes += ["To save memory, weights are in bfloat16."] if dtype == "bfloat16" else []
    if compiled is None:
        compiled = performance == "speed" and gpu is not None and _can_compile(notes)
    elif compiled:
        runtime.check_compiler()
    if compiled:
        notes.append("The first step waits until the blocks are compiled, and so does that of each new size.")
    return Settings(offload=chosen, tiling=tiling, compile=compiled, dtype=dtype, notes=tuple(notes))


def _offload(
    checkpoint: Checkpoint,
    weights: tuple[float, float] | None,
    gpu: Memory | None,
    *,
    performance: str,
    is_small: bool,
) -> tuple[str | None, list[str]]:
    """Return what to offload, and why where that was a question; `weights` are all and the largest part's, in GB."""
    if gpu is None:
        why = ["There is no memory of a GPU to save: nothing is offloaded."] if performance == "memory" else []
        return "none", why
    if performance == "memory":
        return "group", [f"To save memory of {gpu.device}, weights are there only while they are used."]
    if weights is None:
        return None, [f'What is offloaded is chosen once "{checkpoint.name}" is here, and its weights can be counted.']
    if is_small:
        return "none", []
    free, share = gpu.free / 1e9, WEIGHTS_SHARE[performance]
    whole, largest = weights
    have = f"{free:.1f} GB of {gpu.device} are free"
    if (checkpoint.peak.whole or whole / share) <= free:
        return "none", [f"{have}, and the weights take {whole:.1f} GB: nothing is offloaded."]
    if (checkpoint.peak.offload or largest / share) <= free:
        return "model", [
            f"{have}, and the weights take {whole:.1f} GB, the largest model {largest:.1f}: each model is there only "
            "while it runs (--offload model)."
        ]
    return "group", [
        f"{have}, and the largest model takes {largest:.1f} GB: each block is there only while it runs "
        "(--offload group), which is slow."
    ]


def _weights_gb(checkpoint: Checkpoint, dtype: str) -> tuple[float, float] | None:
    """Return what all weights take and what those of the largest part do; None where they are not known."""
    name = "float32" if runtime.DTYPES.get(dtype) == "float32" else "bfloat16"
    whole, largest = checkpoint.weights_gb(dtype=name), checkpoint.weights_gb(dtype=name, offload=True)
    if whole is not None and largest is not None:
        return whole, largest
    if checkpoint.source == "hub":
        return None
    size = sum(file.size for file in checkpoint.files) / 1e9
    return size, size


def _can_compile(notes: list[str]) -> bool:
    try:
        runtime.check_compiler()
    except UsageError as error:
        notes.append(f"Nothing is compiled. {error.message}")
        return False
    return True


def _without_gpu(device: str) -> str:
    return f'"{device}" uses the main memory alone' if device in ("cpu", "mps") else "there is no such GPU here"


def _check_name(option: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UsageError(
            f'There is no {option} "{name}".{did_you_mean(name, known)}', tip=f"choose one of: {', '.join(known)}."
        )
