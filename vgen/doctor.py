"""What this machine has and lacks for making videos, asked check by check."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import vgen
from vgen import checkpoints, files, outputs, runtime
from vgen.errors import VgenError
from vgen.hub import readable

Level = Literal["ok", "note", "problem"]

REINSTALL = "install vgen anew from its folder: pip install --force-reinstall FOLDER"
# Below this an output folder has too little space for latents and videos, and a cache for any checkpoint of the hub.
SPACE_TO_WRITE, SPACE_FOR_CHECKPOINTS = 10**9, 30 * 10**9
# Optional packages: where each is imported from, and what happens without it.
PACKAGES = {
    "peft": ("peft", "LoRAs cannot be loaded"),
    "torchao": ("torchao", "its quantized weights cannot be loaded"),
    "triton": ("triton", "there are no compiled kernels on a GPU"),
    "flash-attn": ("flash_attn", "attention is torch's own"),
    "sageattention": ("sageattention", "attention is torch's own"),
    "xformers": ("xformers", "attention is torch's own"),
    "kernels": ("kernels", "no kernels come from the hub; attention is torch's own"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found: "ok", a "note" on what is done without, or a "problem", which has a fix."""

    name: str
    level: Level
    says: str
    fix: str | None = None


# A check yields what it finds. What it raises is a finding, too: a problem where vgen needs what it asks for.
Run = Callable[[], Iterator[Finding]]


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something to ask of this machine, given up after so many `seconds`."""

    run: Run
    needed: bool
    seconds: float = 300.0


def examine(checks: dict[str, Check] | None = None) -> list[Finding]:
    """Return what all checks found, in their order; they run at the same time and none can stop another."""
    checks = CHECKS if checks is None else checks
    found: dict[str, list[Finding]] = {}

    def ask(name: str, check: Check) -> None:
        try:
            found[name] = list(check.run())
        except Exception as error:
            tip = error.tip if isinstance(error, VgenError) else None
            says = error.message if isinstance(error, VgenError) else f"{type(error).__name__}: {error}"
            found[name] = [_failed(name, check, says.strip().splitlines()[0], tip)]

    threads = {name: threading.Thread(target=ask, args=(name, check), daemon=True) for name, check in checks.items()}
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(checks[name].seconds)
    return [
        finding
        for name, check in checks.items()
        for finding in found.get(name) or [_failed(name, check, f"no answer in {check.seconds:g} s", None)]
    ]


def works(findings: Sequence[Finding]) -> bool:
    """Return whether `vgen generate` would work: nothing is a problem."""
    return all(finding.level != "problem" for finding in findings)


def _failed(name: str, check: Check, says: str, fix: str | None) -> Finding:
    if not check.needed:
        return Finding(name=name, level="note", says=says, fix=fix)
    return Finding(name=name, level="problem", says=says, fix=fix or REINSTALL)


def _versions() -> Iterator[Finding]:
    import torch  # that it is installed does not say that it can be imported

    versions = [f"{name} {metadata.version(name)}" for name in ("diffusers", "transformers")]
    says = ", ".join((f"vgen {vgen.__version__}", f"torch {torch.__version__}", *versions))
    yield Finding(name="versions", level="ok", says=f"{says}, Python {platform.python_version()}")


def _cpu() -> Iterator[Finding]:
    cpu = runtime.processor()
    memory = f"{readable(cpu.free)} of {readable(cpu.total)} memory free"
    parts = [f"{cpu.num_threads} threads", memory, *([", ".join(cpu.features)] if cpu.features else [])]
    yield Finding(name="cpu", level="ok", says=", ".join(parts))


def _gpus() -> Iterator[Finding]:
    gpus = runtime.gpus()
    for gpu in gpus:
        says = f"{gpu.name}, {readable(gpu.free)} of {readable(gpu.total)} memory free"
        yield Finding(name=gpu.device, level="ok", says=says + (f", sm_{gpu.capability}" if gpu.capability else ""))
    if not gpus:
        # The driver's own tool is there, so a GPU is, too.
        fix = "install a torch with CUDA: https://pytorch.org/get-started" if shutil.which("nvidia-smi") else None
        yield Finding(name="gpu", level="note", says="torch sees none: videos are made on the CPU", fix=fix)


def _dtype() -> Iterator[Finding]:
    chosen = runtime.choose()
    usable = [name for name in ("float32", "bfloat16", "float16") if runtime.multiplies(chosen.device, name)]
    if chosen.dtype not in usable:
        raise VgenError(f"{chosen.device} cannot multiply {chosen.dtype}.", tip="install a torch for this machine.")
    others = ", ".join(name for name in usable if name != chosen.dtype)
    says = f"{chosen.dtype} on {chosen.device} is chosen" + (f"; {others} would do" if others else "")
    yield Finding(name="dtype", level="ok", says=says)


def _packages() -> Iterator[Finding]:
    for name, (module, without) in PACKAGES.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name=name, level="note", says=f"not installed: {without}")
            continue
        # In a process of its own: what was built for another torch may end the one that imports it.
        done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            yield Finding(name=name, level="ok", says=version)
            continue
        reason = (done.stderr.strip().splitlines() or [f"it ends Python with code {done.returncode}"])[-1]
        says = f"{version} cannot be imported: {without} ({reason})"
        yield Finding(name=name, level="note", says=says, fix=f"pip install --force-reinstall {name}")


def _compiler() -> Iterator[Finding]:
    names = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if found and header.is_file():
        yield Finding(name="compiler", level="ok", says=found)
    else:
        lacks = f"Python's headers are not in {header.parent}" if found else "no C++ compiler"
        fix = "install python3-dev" if found else "install g++"
        yield Finding(name="compiler", level="note", says=f"{lacks}: torch cannot compile models", fix=fix)


def _kernels() -> Iterator[Finding]:
    from vgen.attention.kernels import cpu as sparse
    from vgen.attention.kernels import dense
    from vgen.quantization import cpu as integers

    found = {
        "sparse attention": sparse.why_not_compiled(),
        "integer layers": integers.why_not_compiled(),
        "attention of --compile": dense.why_not_compiled(),
    }
    for what, reason in found.items():
        if reason is None:
            yield Finding(name="cpu-kernels", level="ok", says=f"{what}: compiled for this CPU")
        else:
            says = f"{what}: torch's own, which is slower, as {reason}"
            fix = "install g++" if "compiler" in reason else None
            yield Finding(name="cpu-kernels", level="note", says=says, fix=fix)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_session, get_token

    token = "with a token" if get_token() else "without a token, which gated models need"
    if constants.HF_HUB_OFFLINE:
        says = "offline, as HF_HUB_OFFLINE says: checkpoints that were pulled work"
        yield Finding(name="hub", level="note", says=says, fix="unset HF_HUB_OFFLINE")
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5).close()
    except Exception as error:
        says = f"{constants.ENDPOINT} does not answer ({type(error).__name__}): checkpoints that were pulled work"
        yield Finding(name="hub", level="note", says=says, fix="check the connection and the proxy")
        return
    yield Finding(name="hub", level="ok", says=f"{constants.ENDPOINT} answers, {token}")


def _cache() -> Iterator[Finding]:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    yield _space("cache", folder, SPACE_FOR_CHECKPOINTS, "note", "free some, or name another folder in HF_HOME")


def _output() -> Iterator[Finding]:
    folder = outputs.DEFAULT_FOLDER.absolute()
    yield _space("output", folder, SPACE_TO_WRITE, "problem", "free some, or write elsewhere with --output")


def _space(name: str, folder: Path, enough: int, otherwise: Level, fix: str) -> Finding:
    free, there = files.free_space(folder)
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return Finding(name=name, level=otherwise, says=f"{there} cannot be written to", fix=fix)
    if free < enough:
        return Finding(name=name, level=otherwise, says=f"{readable(free)} free in {folder}, which is little", fix=fix)
    return Finding(name=name, level="ok", says=f"{readable(free)} free in {folder}")


def _ffmpeg() -> Iterator[Finding]:
    import imageio_ffmpeg

    from vgen import video

    path = imageio_ffmpeg.get_ffmpeg_exe()
    done = subprocess.run([path, "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=20)
    have = {words[1] for line in done.stdout.splitlines() if len(words := line.split()) > 1}
    needed = [*video.encoders()]
    if missing := [name for name in needed if name not in have]:
        raise VgenError(
            f"{path} has no {' and no '.join(missing)}.",
            tip="unset IMAGEIO_FFMPEG_EXE, or: pip install imageio-ffmpeg",
        )
    yield Finding(name="ffmpeg", level="ok", says=f"{Path(path).name} with {', '.join(needed)}")


def _checkpoint() -> Iterator[Finding]:
    embedded = checkpoints.resolve("toyland")
    checkpoints.verify(embedded, full=True)
    size = readable(sum(file.size for file in embedded.files))
    yield Finding(name="toyland", level="ok", says=f"the embedded checkpoint is whole, {size}")


# In the order in which they are printed.
CHECKS = {
    "versions": Check(run=_versions, needed=True),
    "cpu": Check(run=_cpu, needed=False),
    "gpu": Check(run=_gpus, needed=False),
    "dtype": Check(run=_dtype, needed=True),
    "toyland": Check(run=_checkpoint, needed=True),
    "ffmpeg": Check(run=_ffmpeg, needed=True),
    "output": Check(run=_output, needed=True),
    "cache": Check(run=_cache, needed=False),
    "hub": Check(run=_hub, needed=False, seconds=15.0),
    "packages": Check(run=_packages, needed=False, seconds=120.0),
    "compiler": Check(run=_compiler, needed=False),
    "cpu-kernels": Check(run=_kernels, needed=False),
}
