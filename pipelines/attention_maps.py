"""Pictures of where attention lies, and of the masks that each method would choose there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import attention, files
from vgen.attention.patterns import Pattern, Site
from vgen.errors import UsageError
from vgen.pipelines import run
from vgen.pipelines.run import Watch
from vgen.plan import Plan

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from vgen.attention.blocks import BlockMask, Layout

SIDE, GAP, LABEL = 256, 8, 14  # pixels
# From nothing to much, as red, green and blue; what a mask leaves out is grey.
COLOURS = ((8, 8, 40), (80, 20, 110), (190, 55, 85), (250, 150, 40), (252, 250, 190))
LEFT_OUT = (205, 205, 205)
LEGEND = ("rows: queries, columns: keys, by block", "bright: much attention; grey: left out")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which maps to draw: layers, heads and steps from 0, and the methods whose masks are laid over them.

    Without a choice, the first, the middle and the last layer, the first four heads, and the step in the middle.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    methods: tuple[str, ...] = ("tile", "adaspa", "sliding-tile", "radial")


def show(plan: Plan, wanted: Wanted, folder: Path, *, watch: Watch) -> list[dict[str, Any]]:
    """Make a plan's video with dense attention, and draw a picture for each layer and step; return what is on them.

    Each picture has a column for each head; the first row is the mass of its blocks, the others each method's mask of
    it. The mask of a static method is its own; an adaptive one searches there and then. Raises `UsageError`.
    """
    import torch

    from vgen.attention.mass import block_mass, recall
    from vgen.pipelines import text_to_video

    methods = {name: attention.parse(name) for name in wanted.methods}
    num_steps = plan.num_inference_steps
    steps = _inside(wanted.steps or (num_steps // 2,), num_steps, "step")
    backbone = run.load(plan, watch=watch)
    sparse = text_to_video.sparse_attention(replace(plan, attention="dense"), backbone)
    assert sparse is not None
    num_layers = len(sparse.slots)
    layers = _inside(wanted.layers or (0, num_layers // 2, num_layers - 1), num_layers, "layer")
    for method in methods.values():
        method.check(sparse.grid, num_layers)
    found: list[dict[str, Any]] = []

    def look(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lay_out: Callable[[Pattern], Layout], site: Site) -> None:
        path = folder / f"layer-{site.layer:02}-step-{site.step:02}.png"
        if site.layer not in layers or site.step not in steps or site.branch or path.exists():
            return
        heads = _inside(wanted.heads or range(min(4, q.shape[1])), q.shape[1], "head")
        rows: list[list[Image.Image]] = []
        for name, method in {"map": attention.parse("dense"), **methods}.items():
            layout = lay_out(method)
            parts = [layout.split(x) for x in (q, k, v)]
            mass = block_mass(parts[0], parts[1], layout, site.scale)
            mask = None if name == "map" else _mask(method, parts, layout, site)
            recalls = torch.ones(mass.shape[:2]) if mask is None else recall(mask, mass)
            row = []
            for head in heads:
                kept = None if mask is None else mask.kept[0, head % mask.kept.shape[1]]
                label = f"layer {site.layer} head {head} step {site.step}"
                if kept is not None and mask is not None:
                    own = replace(mask, kept=kept[None, None]).sparsity
                    share = recalls[0, head].item()
                    label = f"{name}: sparsity {own:.2f} recall {share:.2f}"
                    found.append(
                        {"layer": site.layer, "head": head, "step": site.step, "method": name}
                        | {"sparsity": round(own, 4), "recall": round(share, 4), "picture": path.name}
                    )
                row.append(_picture(mass[0, head].cpu().numpy(), None if kept is None else kept.cpu().numpy(), label))
            rows.append(row)
        with files.atomic(path) as part:
            _sheet(rows).save(part)

    sparse.look = look
    text_to_video.generate(
        plan, backbone, on_stage=watch.on_stage, on_step=watch.on_step, on_warning=watch.on_warning, sparse=sparse
    )
    files.write_text(folder / "masks.json", json.dumps(found, indent=2) + "\n")
    return found


def _mask(method: Pattern, parts: list[Tensor], layout: Layout, site: Site) -> BlockMask | None:
    """Return the mask that a method would choose at a site, its warm-up over."""
    late = replace(site, step=site.num_steps - 1, memory={})
    for _ in range(2):  # the first time, an adaptive method searches and is dense
        choice = method.choose(parts[0], parts[1], parts[2], layout, late)
        if choice.mask is not None:
            return choice.mask
    return None


def _inside(numbers: Sequence[int], count: int, what: str) -> tuple[int, ...]:
    outside = [number for number in numbers if not 0 <= number < count]
    if outside:
        raise UsageError(f"There is no {what} {outside[0]}.", tip=f"choose from 0 to {count - 1}.")
    return tuple(dict.fromkeys(numbers))


def _picture(mass: np.ndarray, kept: np.ndarray | None, label: str) -> Image.Image:
    """Return a map [N, N] as a square, logarithmic from a thousandth of the most; with a mask, grey where left out."""
    import numpy as np
    from PIL import Image, ImageDraw

    level = np.log10(np.clip(mass / max(mass.max(), 1e-12), 1e-3, 1)) / 3 + 1
    anchors = np.linspace(0, 1, len(COLOURS))
    pixels = np.stack([np.interp(level, anchors, [colour[c] for colour in COLOURS]) for c in range(3)], -1)
    if kept is not None:
        pixels = np.where(kept[..., None], pixels, LEFT_OUT)
    picture = Image.new("RGB", (SIDE, SIDE + LABEL), "white")
    square = Image.fromarray(pixels.astype(np.uint8))
    how = Image.Resampling.NEAREST if len(mass) <= SIDE else Image.Resampling.BOX
    picture.paste(square.resize((SIDE, SIDE), how), (0, LABEL))
    ImageDraw.Draw(picture).text((2, 1), label, fill="black")
    return picture


def _sheet(rows: list[list[Image.Image]]) -> Image.Image:
    from PIL import Image, ImageDraw

    width, height = SIDE + GAP, SIDE + LABEL + GAP
    sheet = Image.new("RGB", (width * len(rows[0]) - GAP, height * len(rows) + LABEL * len(LEGEND)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet.paste(picture, (j * width, i * height))
    for i, line in enumerate(LEGEND):
        ImageDraw.Draw(sheet).text((2, height * len(rows) + LABEL * i), line, fill="black")
    return sheet
