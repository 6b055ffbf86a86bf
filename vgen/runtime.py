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
# The features of a CPU that multiplies bfloat16 in hardware.
_MULTIPLIES_BFLOAT16 = ("avx512_bf16", "amx_bf16")


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
    if kind not in DEVICES or (colon and not (kind == "cuda" and index.isdecimal())):
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

    "auto" is the process's current GPU, at first the first one, where there is any, else the CPU; and bfloat16 on a
    GPU, or on a CPU that multiplies bfloat16 in hardware, else float32. Raises `UsageError` for an unknown name and a
    device that this machine lacks.
    """
    check_names(device, dtype)
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda"):
        count = torch.cuda.device_count()
        number = int(device.partition(":")[2] or (torch.cuda.current_device() if count else 0))
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


def check_gpus(device: str, num_gpus: int) -> None:
    """Raise `UsageError` unless torch sees so many CUDA GPUs, or is asked for the CPU."""
    import torch

    count = torch.cuda.device_count()
    if device != "cpu" and num_gpus > count:
        raise UsageError(
            f"--gpus {num_gpus} asks for {num_gpus} CUDA GPUs, and torch sees {count}.",
            tip=f"use --gpus {count}." if count > 1 else "leave out --gpus.",
        )


def join(rank: int, num_ranks: int, device: str) -> None:
    """Make this process one of several that share a video: with a GPU or a part of the processor's cores of its own.

    The address of the others is in the environment, as torchrun puts it there.
    """
    from datetime import timedelta

    import torch
    from torch import distributed

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    if device != "cpu":
        torch.cuda.set_device(rank)
    # Lengths are exchanged on the CPU, tensors where they are. Whoever launched the ranks ends those that wait for one
    # that failed, so no time limit is needed here.
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=timedelta(days=1))


@dataclass(frozen=True, kw_only=True)
class Processor:
    """The CPU: the threads that torch uses, main memory in bytes, and what it has for fast matrix products."""

    num_threads: int
    free: int
    total: int
    features: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU: its device, name, memory in bytes, and compute capability such as "90" (None where there is no such)."""

    device: str
    name: str
    free: int
    total: int
    capability: str | None


def processor() -> Processor:
    """Return what is known of the CPU."""
    import psutil
    import torch

    memory, has = psutil.virtual_memory(), torch.cpu.get_capabilities()
    features = tuple(name for name in ("avx2", "avx512_f", *_MULTIPLIES_BFLOAT16) if has.get(name, False))
    return Processor(num_threads=torch.get_num_threads(), free=memory.available, total=memory.total, features=features)


def gpus() -> list[Gpu]:
    """Return the GPUs that torch sees."""
    import torch

    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        free = total - torch.mps.driver_allocated_memory()
        return [Gpu(device="mps", name="Apple GPU", free=free, total=total, capability=None)]
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = "".join(map(str, torch.cuda.get_device_capability(index)))
        name = torch.cuda.get_device_name(index)
        found.append(Gpu(device=f"cuda:{index}", name=name, free=free, total=total, capability=capability))
    return found


def multiplies(device: str, dtype: str) -> bool:
    """Return whether matrices of a dtype can be multiplied on a device, with the result that is expected."""
    import torch

    try:
        ones = torch.ones(32, 32, device=device, dtype=getattr(torch, dtype))
        return bool((ones @ ones == 32).all())
    except (RuntimeError, TypeError):
        return False


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
    return any(capabilities.get(name, False) for name in _MULTIPLIES_BFLOAT16)


def _has_gpu_driver() -> bool:
    """Return whether there may be a GPU with a memory of its own: NVIDIA's, AMD's, or one behind Windows."""
    if sys.platform == "win32":
        return shutil.which("nvidia-smi") is not None
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
