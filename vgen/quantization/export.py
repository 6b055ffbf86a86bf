"""A quantized model on disk: a folder in diffusers' layout that tells what it was made of.

Beside the components there are vgen.json, what resolving, verifying and running it needs, and quantization.json, the
bits and errors of every layer. The transformers' config.json names the method and each layer's format.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vgen
from vgen import files, integrity, manifest
from vgen.checkpoints import CARD_FORMAT, Checkpoint, write_card
from vgen.errors import UsageError, VgenError
from vgen.hub import readable
from vgen.quantization.layers import COMPONENTS, Layer
from vgen.quantization.scheme import LayerFormat

if TYPE_CHECKING:
    from torch import Tensor

    from vgen.backbones import Backbone

PLAN = "quantization.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARD = 2**31  # bytes
SPARE = 2**20  # bytes, for what is small: configurations, the card, the report


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes: of the quantized layers in bfloat16 and after, and of the whole folder's weights before and after."""

    layers_before: int
    layers_after: int
    before: int
    after: int

    @property
    def share(self) -> float:
        """What the quantized layers take, of what they take in bfloat16."""
        return self.layers_after / self.layers_before

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as reports have them."""
        return {
            "layers_before": self.layers_before,
            "layers_after": self.layers_after,
            "layers_share": round(self.share, 4),
            "before": self.before,
            "after": self.after,
        }


def sizes(checkpoint: Checkpoint, layers: Sequence[Layer], formats: Mapping[Layer, LayerFormat]) -> Sizes:
    """Return the sizes of an export; parameters that stay as they are count as they are stored."""
    assert checkpoint.folder is not None
    quantized = {(layer.component, f"{layer.name}.weight") for layer in layers}
    before = after = 0
    for path in _copied(checkpoint.folder):
        before += path.stat().st_size
        after += path.stat().st_size
    for component in COMPONENTS:
        for path in (checkpoint.folder / component).glob("*.safetensors"):
            for name, tensor in integrity.tensors(path, tip="get the file anew.").items():
                before += tensor.num_bytes
                after += 0 if (component, name) in quantized else tensor.num_bytes
    layers_after = sum(formats[layer].num_bytes(layer.in_features, layer.out_features) for layer in layers)
    return Sizes(
        layers_before=2 * sum(layer.num_weights for layer in layers),
        layers_after=layers_after,
        before=before,
        after=after + layers_after,
    )


def check_parent(checkpoint: Checkpoint) -> None:
    """Raise `UsageError` for a model that is quantized already, by vgen or by another tool."""
    by = f"vgen as {checkpoint.quantization}" if checkpoint.quantization else None
    if by is None and checkpoint.folder is not None:
        for component in COMPONENTS:
            path = checkpoint.folder / component / "config.json"
            config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if "quantization_config" in config:
                by = str(config["quantization_config"].get("quant_method", "another tool"))
    if by is not None:
        raise UsageError(
            f'"{checkpoint.name}" is quantized already, by {by}.', tip="give the model that it was made of."
        )


def check_space(output: Path, num_bytes: int) -> None:
    """Raise `VgenError` unless the disk of a folder to be has room for so many bytes."""
    free, existing = files.free_space(output.resolve().parent)
    if num_bytes + SPARE > free:
        raise VgenError(
            f"The export takes {readable(num_bytes)}, and {existing} has {readable(free)} left.",
            tip="free some space, or choose another disk with --output.",
        )


def write(
    folder: Path,
    backbone: Backbone,
    formats: Mapping[Layer, LayerFormat],
    *,
    scheme: str,
    plan: Mapping[str, Any],
    readme: str,
) -> None:
    """Write a backbone, whose layers are quantized, to a new folder; `plan` becomes quantization.json.

    In torchao's layout where that has a place for all of it, so that other tools load it too.
    """
    from vgen.quantization import layers as of_backbone
    from vgen.quantization import torchao

    parent = backbone.checkpoint
    assert parent.folder is not None
    folder.mkdir(parents=True)
    for path in _copied(parent.folder):
        target = folder / path.relative_to(parent.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for component, model in of_backbone.components(backbone).items():
        (folder / component).mkdir()
        config = json.loads((parent.folder / component / "config.json").read_text(encoding="utf-8"))
        mine = {layer.name: format for layer, format in formats.items() if layer.component == component}
        told = {
            "format": CARD_FORMAT,
            "scheme": scheme,
            "layers": {name: asdict(format) for name, format in mine.items()},
        }
        state, header = model.state_dict(), {"format": "pt"}
        if torchao.carries(mine.values()):
            config["quantization_config"] = {**torchao.config(next(iter(mine.values()))), "vgen": told}
            state, header = torchao.flattened(state, mine, backbone.runtime.dtype)
        else:
            config["quantization_config"] = {"quant_method": "vgen", **told}
        _write_json(folder / component / "config.json", config)
        _save(folder / component, state, header)
    _write_json(folder / PLAN, plan)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    write_card(
        folder,
        # LoRAs are merged before: what is quantized has no weights to add them to.
        replace(parent, quantization=scheme, can=replace(parent.can, lora=False)),
        versions=manifest.versions(),
        parent=manifest.identity(parent),
    )


def _save(folder: Path, state: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write a model's tensors in files of `SHARD` bytes at most: no more than one is copied at a time."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(
        dict(state), filename_pattern=WEIGHTS.replace(".", "{suffix}."), max_shard_size=SHARD
    )
    try:
        for name, keys in split.filename_to_tensors.items():
            save_file({key: state[key].detach().contiguous().cpu() for key in keys}, folder / name, metadata=header)
    except SafetensorError as error:  # What the system refuses is one of these, and no OSError.
        raise VgenError(
            f"Could not write {folder.parent.parent}: {error}.",
            tip="free some space, or choose another disk with --output.",
        ) from error
    if split.is_sharded:
        _write_json(
            folder / f"{WEIGHTS}.index.json",
            {"metadata": {"total_size": split.metadata["total_size"]}, "weight_map": split.tensor_to_filename},
        )


def model_card(
    checkpoint: Checkpoint, scheme: str, formats: Iterable[LayerFormat], sizes: Sizes, measured: Sequence[str]
) -> str:
    """Return the README of an export: what it is, how it runs, what it takes and what was measured."""
    from vgen.quantization import torchao

    others = (
        "diffusers with torchao loads it too, transformer or pipeline: `from_pretrained(FOLDER)`."
        if torchao.carries(formats)
        else "Only vgen reads this folder: other tools know neither the balancing nor the packed integers."
    )
    parent = checkpoint.anchored_name
    licence = checkpoint.licence or "that of the original model"
    lines = [
        "---",
        "library_name: vgen",
        f"tags: [quantized, {scheme.partition(':')[0]}, text-to-video]",
        "---",
        f"# {parent}, quantized: {scheme}",
        "",
        f"Made by vgen {vgen.__version__} of `{parent}` (family {checkpoint.family}). Licence: {licence}.",
        "",
        '    vgen generate "..." --model FOLDER',
        "",
        f"The quantized layers take {readable(sizes.layers_after)}, {sizes.share:.3f} of what they take in bfloat16.",
        "`quantization.json` has the bits and the error of each and lists what stays as it was; `report.html` has",
        f"what it cost. {others}",
        *(["", "## Measured", "", *(f"* {line}" for line in measured)] if measured else []),
    ]
    return "\n".join(lines) + "\n"


def _copied(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that an export has as they are: those of all parts but the transformers."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] and name not in COMPONENTS]
    found = [folder / "model_index.json"]
    for part in parts:
        found += sorted(path for path in (folder / part).rglob("*") if path.is_file())
    return found


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
