"""Models that wait in main memory and come to the GPU when they run, by accelerate's and diffusers' own hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from vgen.backbones import Backbone

# What is on the GPU at a time: everything; the model that runs; or a block of it.
OFFLOADS = ("none", "model", "group")


def offload(backbone: Backbone) -> None:
    """Hook the models of a backbone, all in main memory, as its runtime says.

    By "group", transformers come block by block and text encoders layer by layer; the rest, which is small, comes as
    it does by "model": whole, when it is called.
    """
    from vgen.backbones.components import is_transformer, models_of

    runtime = backbone.runtime
    for name, model in models_of(backbone).items():
        if runtime.offload == "group" and is_transformer(name):
            by_blocks(model, runtime.device)
        elif runtime.offload == "group" and name.startswith("text_encoder"):
            by_layers(model, runtime.device)
        else:
            whole(model, runtime.device)


def whole(model: nn.Module, device: str) -> None:
    """Let a model come to a device when it is called, and stay there until `rest`."""
    import torch
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, torch.device(device))


def by_blocks(model: nn.Module, device: str, **options: Any) -> None:
    """Let each of a transformer's blocks come to a device when it runs, and leave after it.

    `options` are more of those of diffusers' `apply_group_offloading`. Its `use_stream` would fetch the next block
    while one computes; but after the first pass it takes its tracking hooks off from under those of a cache, and with
    them the cache's own (diffusers 0.42.1, `HookRegistry.remove_hook`).
    """
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(model, device, offload_type="block_level", num_blocks_per_group=1, **options)


def by_layers(model: nn.Module, device: str, **options: Any) -> None:
    """Let each layer of a model, whatever it is made of, come to a device when it runs, and leave after it."""
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(model, device, offload_type="leaf_level", **options)


def rest(backbone: Backbone) -> None:
    """Send the models that `whole` let come back to main memory: the next stage of a run needs others."""
    from vgen.backbones.components import models_of

    for model in models_of(backbone).values():
        # Where accelerate keeps a model's hook, and diffusers looks for it.
        if (hook := getattr(model, "_hf_hook", None)) is not None:
            hook.init_hook(model)
