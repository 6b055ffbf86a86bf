"""What a method is worth on this machine: the same work with it and without, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from vgen import runtime
from vgen.errors import UsageError
from vgen.runtime import Runtime


def check_memory(num_bytes: int, device: str) -> None:
    """Raise `UsageError` where tensors do not fit into what is free of a device's memory."""
    free = runtime.memory(device).free
    if num_bytes > free:
        raise UsageError(
            f"The tensors do not fit into the {free / 1e9:.1f} GB of memory that {device} has free.",
            tip="measure something smaller, such as fewer --tokens.",
        )


def in_turns(
    calls: dict[str, Callable[[], object]], repeats: int, chosen: Runtime, *, warm: bool = True
) -> dict[str, float]:
    """Return the median seconds of each call: all are run in turn, `repeats` times, after one turn to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + warm):
        for name, call in calls.items():
            runtime.synchronize(chosen)
            start = time.perf_counter()
            call()
            runtime.synchronize(chosen)
            if turn >= warm:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}
