"""Which device and number format a run uses, and what it cost: the only place that asks about hardware."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vgen.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A device ("cpu", "cuda:0", ...) and the number format of transformer and text encoder ("bfloat16", ...).

    `offload` is one of `vgen.offloading.OFFLOADS`; with `tiling` videos are decoded in tiles, and with `compile` the
    transformer's blocks are compiled.
    """

    device: str
    dtype: str
    offload: str = "none"
    tiling: bool = False
    compile: bool = False

    @property
    def home(self) -> str:
        """Where models are that do not run: with offloading in main memory."""
        return self.device if self.offload == "none" else "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format as torch names it."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The memory of a device, in bytes: how much there is, and how much of it nothing has taken."""

    device: str
    total: int
    free: int


def check_names(device: str, dtype: str) -> None:
    """Raise `UsageError` unless both are names that `choose` takes; asks no hardware and imports nothing."""
    kind, colon, index = device.partition(":")
    if kind not in DEVICES or (colon and not (kind == "cuda" and index.isdigit())):
        raise UsageError(
            f'There is no device "{device}".{did_you_mean(kind, DEVICES)}',
            tip=f"choose one of: {', '.join(DEVICES)}, or one of several GPUs as cuda:1.",
        )
    if dtype not in DTYPES:
        raise UsageError(
            f'There is no dtype "{dtype}".{did_you_mean(dtype, DTYPES)}', tip=f"choose one of: {', '.join(DTYPES)}."
        )


def choose(device: str = "auto", dtype: str = "auto") -> Runtime:
    """Return the runtime that the names mean on this machine.

    "auto" is the first GPU where there is one, else the CPU; and bfloat16 on a GPU, or on a CPU that multiplies
    bfloat16 in hardware, else float32. Raises `UsageError` for an unknown name and a device that this machine lacks.
    """
    check_names(device, dtype)
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda"):
        number, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
        if number >= count:
            raise UsageError(
                f'There is no device "{device}": torch sees {count} CUDA GPUs.', tip="use --device cpu, or auto."
            )
        device = f"cuda:{number}"
    if device == "mps" and not torch.backends.mps.is_available():
        raise UsageError('There is no device "mps" here.', tip="use --device cpu, or auto.")
    dtype = DTYPES[dtype]
    if dtype == "auto":
        dtype = "float32" if device == "cpu" and not _cpu_multiplies_bfloat16() else "bfloat16"
    return Runtime(device=device, dtype=dtype)


def noise_generator(seed: int) -> torch.Generator:
    """Return a CPU generator for a seed, so that the noise does not depend on the device."""
    import torch

    return torch.Generator("cpu").manual_seed(seed)


def synchronize(runtime: Runtime) -> None:
    """Wait until the device has done what it was asked, so that a clock reads the truth."""
    import torch

    if runtime.device.startswith("cuda"):
        torch.cuda.synchronize(runtime.device)
    elif runtime.device == "mps":
        torch.mps.synchronize()


def memory(device: str) -> Memory:
    """Return the memory of a device of `choose`, as it is now; a GPU without a memory of its own has the main one."""
    if device.startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info(device)
        # What torch keeps for later is there for the next tensor.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Memory(device=device, total=total, free=free + kept)
    import psutil

    main = psutil.virtual_memory()
    return Memory(device=device, total=main.total, free=main.available)


@functools.cache
def gpu_memory(device: str) -> Memory | None:
    """Return the memory of the GPU that a device name means, as this process found it; None where it means none.

    A GPU that shares the main memory has none of its own. Imports torch only where there is the driver of a GPU.
    """
    if device in ("cpu", "mps") or not _has_gpu_driver():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    return memory(choose(device).device)


def check_compiler() -> None:
    """Raise `UsageError` when this machine lacks what `torch.compile` calls: a C++ compiler and Python's headers."""
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        raise UsageError(
            f'Compiling needs a C++ compiler, and there is no "{compiler}" here.',
            tip="install one (on Debian: apt install g++), name it in the variable CXX, or leave out --compile.",
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise UsageError(
            f"Compiling needs Python's headers, and there is no {headers / 'Python.h'}.",
            tip="install them (on Debian: apt install python3-dev), or leave out --compile.",
        )


def peak_ram_mb() -> float:
    """Return the most main memory that this process has held so far, in MiB; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def peak_vram_mb(runtime: Runtime) -> float:
    """Return the most GPU memory that torch has held for tensors so far, in MiB; 0 without a CUDA GPU."""
    import torch

    return torch.cuda.max_memory_allocated(runtime.device) / 2**20 if runtime.device.startswith("cuda") else 0.0


def _cpu_multiplies_bfloat16() -> bool:
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def _has_gpu_driver() -> bool:
    """Return whether there may be a GPU with a memory of its own: NVIDIA's, AMD's, or one behind Windows."""
    if sys.platform == "win32":
        return shutil.which("nvidia-smi") is not None
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
