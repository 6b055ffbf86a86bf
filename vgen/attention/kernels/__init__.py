"""Kernels: how attention under a block mask is run. Importing them loads no torch."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vgen.errors import UsageError, VgenError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.attention.blocks import Layout


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A module with `attend(q, k, v, mask, scale)`, the blocks that it does (none: any), and where it runs.

    q, k, v [B, H, N * block, D] are in the order of the mask's layout, and so is what comes back.
    """

    module: str
    blocks: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()
    needs: str | None = None
    about: str


KERNELS = {
    "reference": Kernel(
        module="vgen.attention.kernels.reference", about="dense, with the mask of every pair: what others must equal"
    ),
    "gather": Kernel(module="vgen.attention.kernels.gather", about="torch alone, on any device"),
    "cpu": Kernel(
        module="vgen.attention.kernels.cpu",
        devices=("cpu",),
        about="compiled by this machine's C++ compiler when first used, with AdaSpa's search; else gather",
    ),
    "flex": Kernel(
        module="vgen.attention.kernels.flex",
        blocks=(64, 128, 256),
        devices=("cpu", "cuda"),
        about="torch's FlexAttention, compiled once for a shape",
    ),
    "triton": Kernel(
        module="vgen.attention.kernels.fused",
        blocks=(16, 32, 64, 128),
        devices=("cuda",),
        needs="triton",
        about="fused, for CUDA GPUs; AdaSpa's search, too",
    ),
}


def check_block(name: str, block: int) -> None:
    """Raise `UsageError` for a kernel that does not exist, or does no blocks of this size."""
    if name == "auto":
        return
    if name not in KERNELS:
        raise UsageError(
            f'There is no kernel "{name}".{did_you_mean(name, KERNELS)}',
            tip=f"choose one of: auto, {', '.join(KERNELS)}.",
        )
    blocks = KERNELS[name].blocks
    if blocks and block not in blocks:
        raise UsageError(
            f'The kernel "{name}" does no blocks of {block} tokens.',
            tip=f"choose block={' or block='.join(map(str, blocks))}, or another kernel.",
        )


def why_not(name: str, device: str, block: int = 64) -> str | None:
    """Return in a few words why a kernel cannot be used on a device here; None where it can."""
    kernel = KERNELS[name]
    if kernel.blocks and block not in kernel.blocks:
        return f"it does no blocks of {block} tokens"
    kind = device.partition(":")[0]
    if kernel.devices and kind not in kernel.devices:
        return f"it runs on {' and '.join(kernel.devices)}, and this is {kind}"
    if kernel.needs is not None and importlib.util.find_spec(kernel.needs) is None:
        return f"{kernel.needs} is not installed"
    return None


def choose(name: str, device: str, block: int) -> str:
    """Return the kernel that a name, or "auto", means on a device. Raises `VgenError` where it cannot be used."""
    if name != "auto":
        if reason := why_not(name, device, block):
            usable = ", ".join(other for other in KERNELS if why_not(other, device, block) is None)
            raise VgenError(f'The kernel "{name}" cannot be used here: {reason}.', tip=f"usable here are: {usable}.")
        return name
    order = ("triton", "flex", "gather") if device.startswith("cuda") else ("cpu", "gather")
    return next(candidate for candidate in order if why_not(candidate, device, block) is None)


def load(name: str) -> Any:
    """Return the module of a kernel."""
    return importlib.import_module(KERNELS[name].module)


def bound(name: str) -> str:
    """Return what a kernel really is on this machine, for the manifest."""
    module = load(name)
    said: str = module.bound() if hasattr(module, "bound") else name
    return said


def search(name: str, q: Tensor, k: Tensor, layout: Layout, scale: float, lse: Tensor) -> Tensor:
    """Return the mass of each block, float32 [B, H, N, N], in one pass over q and k for a known `lse`.

    By the kernel of that name where it has a pass for it, else by torch.
    """
    from vgen.attention import mass

    found: Tensor = getattr(load(name), "block_mass", mass.block_mass)(q, k, layout, scale, lse)
    return found
