"""Kernels in C++ for CPUs: compiled once for each machine, by its own compiler, and kept in the user's cache."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=c++20")


@functools.cache
def why_not_loaded(source: Path, *flags: str) -> str | None:
    """Load the operators in `source`, compiled where that was not done yet; return why that cannot be, or None.

    `flags` are the compiler's, besides `FLAGS`.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "there is no C++ compiler"
    try:
        library = _library(source, compiler, flags)
        if not library.exists():
            _compile(source, compiler, flags, library)
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return said.strip().splitlines()[0] if said.strip() else type(error).__name__
    return None


def _library(source: Path, compiler: str, flags: tuple[str, ...]) -> Path:
    """Return where the library of this source, this torch and this CPU is kept."""
    cpu = Path("/proc/cpuinfo")
    facts = [line for line in cpu.read_text().splitlines() if line.startswith(("flags", "model name"))][:2]
    identity = (source.read_text(), torch.__version__, compiler, platform.machine(), *facts, *FLAGS, *flags)
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "vgen" / f"{source.stem}-{digest}.so"


def _compile(source: Path, compiler: str, flags: tuple[str, ...], library: Path) -> None:
    logger.warning("Compiling %s for this CPU, once ...", source.stem.replace("_", " "))
    library.parent.mkdir(parents=True, exist_ok=True)
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built, object_file = Path(folder, "built.so"), Path(folder, "built.o")
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
        run([compiler, *FLAGS, *flags, f"-I{home / 'include'}", abi, "-c", str(source), "-o", str(object_file)])
        # Without OpenMP, which is then torch's own: two would fight for the same cores.
        run([compiler, "-shared", str(object_file), f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(built)])
        built.replace(library)
