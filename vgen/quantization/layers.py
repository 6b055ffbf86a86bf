"""Which linear layers of a family are quantized, what each serves, and what stays as it is; no torch.

Layers are known by the names and shapes in a checkpoint's files, before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import integrity
from vgen.checkpoints import Checkpoint
from vgen.errors import UsageError
from vgen.quantization.scheme import LayerFormat

if TYPE_CHECKING:
    from torch import nn

    from vgen.backbones import Backbone

SELF, CROSS, FEED_FORWARD = "self-attention", "cross-attention", "feed-forward"

# Family -> what a part of its blocks is. Linear layers in other parts, those of adaptive norms, and all that is
# outside of the blocks (patches, text and time embedding, the last projection) stay as they are: they are few, and
# every token depends on them.
ROLES: dict[str, dict[str, str]] = {
    "wan": {"attn1": SELF, "attn2": CROSS, "ffn": FEED_FORWARD},
    "hunyuan-video": {
        "attn": SELF,
        "ff": FEED_FORWARD,
        "ff_context": FEED_FORWARD,
        "proj_mlp": FEED_FORWARD,
        "proj_out": FEED_FORWARD,
    },
    "hunyuan-video-1.5": {"attn": SELF, "ff": FEED_FORWARD, "ff_context": FEED_FORWARD},
    "cogvideox": {"attn1": SELF, "ff": FEED_FORWARD},
    "ltx-video": {"attn1": SELF, "attn2": CROSS, "ff": FEED_FORWARD},
    "ltx-2": {
        "attn1": SELF,
        "audio_attn1": SELF,
        "attn2": CROSS,
        "audio_attn2": CROSS,
        "audio_to_video_attn": CROSS,
        "video_to_audio_attn": CROSS,
        "ff": FEED_FORWARD,
        "audio_ff": FEED_FORWARD,
    },
}
COMPONENTS = ("transformer", "transformer_2")
_IN_BLOCK = re.compile(r"(?:blocks|transformer_blocks|single_transformer_blocks)\.\d+\.(\w+)")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer: its component, its name in there, and what it serves ("" where it stays as it is)."""

    component: str
    name: str
    role: str
    in_features: int
    out_features: int

    @property
    def path(self) -> str:
        """Its name among all components."""
        return f"{self.component}.{self.name}"

    @property
    def num_weights(self) -> int:
        """How many weights it has, the bias left out."""
        return self.in_features * self.out_features


def of(checkpoint: Checkpoint) -> list[Layer]:
    """Return all linear layers of a checkpoint's transformers, those that stay as they are among them, block by block.

    Raises `CheckpointError` for files that are no safetensors.
    """
    assert checkpoint.folder is not None, "fetched before"
    roles = ROLES[checkpoint.family]
    found: list[Layer] = []
    for component in COMPONENTS:
        for path in sorted((checkpoint.folder / component).glob("*.safetensors")):
            for key, tensor in integrity.tensors(path, tip="get the file anew.").items():
                name, _, kind = key.rpartition(".")
                if kind != "weight" or len(tensor.shape) != 2:
                    continue
                part = _IN_BLOCK.match(name)
                out_features, in_features = tensor.shape
                found.append(
                    Layer(
                        component=component,
                        name=name,
                        role=roles.get(part[1], "") if part else "",
                        in_features=in_features,
                        out_features=out_features,
                    )
                )
    return sorted(found, key=lambda layer: _in_order(layer.path))


def files(checkpoint: Checkpoint, component: str) -> dict[str, Path]:
    """Return the file that has each layer's weight, of those of a component that are quantized, by its name there."""
    assert checkpoint.folder is not None, "fetched before"
    wanted = {f"{layer.name}.weight" for layer in of(checkpoint) if layer.role and layer.component == component}
    return {
        key: path
        for path in sorted((checkpoint.folder / component).glob("*.safetensors"))
        for key in integrity.tensors(path, tip="get the file anew.")
        if key in wanted
    }


def components(backbone: Backbone) -> dict[str, Any]:
    """Return the transformers of a backbone by the names of their folders."""
    found = {name: getattr(backbone, name, None) for name in COMPONENTS}
    return {name: model for name, model in found.items() if model is not None}


def linear(backbone: Backbone, layer: Layer) -> nn.Linear:
    """Return the module that a layer is."""
    module: nn.Linear = components(backbone)[layer.component].get_submodule(layer.name)
    return module


def replace(backbone: Backbone, layer: Layer, module: nn.Module) -> None:
    """Put a module in the place of a layer."""
    components(backbone)[layer.component].set_submodule(layer.name, module)


def check_divides(layers: Sequence[Layer], format: LayerFormat) -> None:
    """Raise `UsageError` unless the groups of a format divide the inputs of all layers."""
    for layer in layers:
        if format.weight_bits == 4 and layer.in_features % 2:
            raise UsageError(
                f"{layer.path} has {layer.in_features} inputs, an odd number, which cannot be packed.",
                tip="use a scheme of 8 bits: w8a8.",
            )
        if format.group and layer.in_features % format.group:
            widths = {other.in_features for other in layers}
            fitting = [size for size in (256, 128, 64, 32, 16, 8) if not any(width % size for width in widths)]
            choice = f"group={fitting[0]}, or group=0 for a scale per channel" if fitting else "group=0"
            raise UsageError(
                f"Groups of {format.group} do not divide the {layer.in_features} inputs of {layer.path}.",
                tip=f"use {choice}.",
            )


def _in_order(path: str) -> list[tuple[int, str]]:
    """Return what sorts names by the numbers in them: block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
