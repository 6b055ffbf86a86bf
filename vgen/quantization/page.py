"""The report as a page: one HTML file that needs nothing else, with charts as SVG and frames as JPEG inside."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vgen.hub import readable
from vgen.quantization.layers import CROSS, FEED_FORWARD, SELF

if TYPE_CHECKING:
    from vgen.video import Frames

SHOWN_VIDEOS, SHOWN_FRAMES, FRAME_HEIGHT = 6, 5, 128  # of the compared; per video; in pixels
COLOURS = {SELF: "#2563a8", CROSS: "#b45309", FEED_FORWARD: "#15803d"}
CHART_WIDTH, CHART_HEIGHT, LEFT, BOTTOM, STRIP = 960, 260, 56, 20, 16  # pixels
LABEL = 'font-size="11" fill="#57534e"'

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1917; background: #fafaf9; margin: 0 auto; max-width: 62rem;
  padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p { margin: .35rem 0; } .quiet { color: #57534e; }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.fact { background: #fff; border: 1px solid #e7e5e4; border-radius: 8px; padding: .6rem .9rem; flex: 1 1 9rem; }
.fact b { display: block; font-size: 1.35rem; font-weight: 600; }
table { border-collapse: collapse; background: #fff; } td, th { border: 1px solid #e7e5e4; padding: .25rem .6rem;
  text-align: right; font-variant-numeric: tabular-nums; } th { background: #f5f5f4; font-weight: 600; }
td:first-child, th:first-child { text-align: left; }
svg { display: block; width: 100%; height: auto; background: #fff; border: 1px solid #e7e5e4; border-radius: 8px; }
.key { display: flex; flex-wrap: wrap; gap: 1.2rem; margin: .4rem 0; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem;
  vertical-align: -.08rem; }
figure { margin: 1rem 0 1.5rem; } figcaption { margin-bottom: .3rem; }
.row { display: grid; grid-template-columns: 6.5rem 1fr; align-items: center; gap: .5rem; margin: .15rem 0; }
.row img { width: 100%; border-radius: 4px; display: block; }
.scroll { overflow-x: auto; } details { margin-top: .75rem; } summary { cursor: pointer; }
.warning { background: #fef3c7; border: 1px solid #fcd34d; border-radius: 8px; padding: .5rem .8rem; }
"""


def render(report: Mapping[str, Any], videos: Sequence[tuple[str, Frames, Frames]]) -> str:
    """Return the page of a report; videos are prompt, original and quantized frames uint8 [F, H, W, 3]."""
    title = html.escape(f"{report['model']}, quantized: {report['scheme']}")
    sections = [
        f"<h1>{title}</h1>",
        f'<p class="quiet">vgen {html.escape(report["vgen"])}, torch {html.escape(report["versions"]["torch"])}, '
        f"{html.escape(report['device'])}, {html.escape(report['dtype'])}; {_arithmetic(report)}.</p>",
        _warning(report),
        _facts(report),
        _sizes(report),
        _layers(report),
        _groups(report),
        _scores(report),
        _videos(report, videos),
        _details(report),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n'
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def worst_error(layer: Mapping[str, Any]) -> float | None:
    """Return a layer's largest error of any range of noise levels; None where nothing was seen."""
    known = [error for error in layer["error_per_range"] if error is not None]
    return max(known) if known else None


def _arithmetic(report: Mapping[str, Any]) -> str:
    return {
        "int8": "int8 products",
        "simulated": "int8 products simulated in floating point",
        "float": "floating-point products of weights that are unpacked as they are used",
    }[report["arithmetic"]]


def _warning(report: Mapping[str, Any]) -> str:
    if report["arithmetic"] != "simulated":
        return ""
    return (
        '<p class="warning">This device has no exact int8 products, so that they were <b>simulated</b>: the frames '
        "are right, and the speed says nothing about the scheme.</p>"
    )


def _facts(report: Mapping[str, Any]) -> str:
    sizes, comparison, score = report["bytes"], report["comparison"], report["score"]
    facts = [
        (f"{sizes['layers_share']:.2f}×", "bytes of the quantized layers, of bfloat16"),
        (f"{report['bits_per_weight']:.2f}", "bits per weight, everything counted"),
    ]
    if comparison is not None:
        facts += [(f"{comparison['psnr']:.1f} dB", "PSNR against the original, same seed")]
        facts += [(f"{comparison['ssim']:.3f}", "SSIM")]
        facts += [(f"{comparison['speedup']:.2f}×", "speed of denoising")]
    if score is not None:
        before, after = (100 * score[name]["joint"] for name in ("before", "after"))
        facts += [(f"{before:.1f} → {after:.1f}", f"joint score in %, {score['prompts']} prompts")]
    return (
        '<div class="facts">'
        + "".join(f'<div class="fact"><b>{value}</b>{html.escape(what)}</div>' for value, what in facts)
        + "</div>"
    )


def _sizes(report: Mapping[str, Any]) -> str:
    sizes = report["bytes"]
    rows = [
        ("quantized layers (before: in bfloat16)", sizes["layers_before"], sizes["layers_after"]),
        ("all files of weights", sizes["before"], sizes["after"]),
    ]
    cells = "".join(
        f"<tr><td>{what}</td><td>{readable(before)}</td><td>{readable(after)}</td><td>{after / before:.3f}</td></tr>"
        for what, before, after in rows
    )
    return f"<h2>Bytes</h2><table><tr><th></th><th>before</th><th>after</th><th>share</th></tr>{cells}</table>"


def _layers(report: Mapping[str, Any]) -> str:
    layers = report["layers"]
    key = "".join(
        f'<span><i style="background:{colour}"></i>{role}</span>'
        for role, colour in COLOURS.items()
        if any(layer["role"] == role for layer in layers)
    )
    return (
        "<h2>Error and bits of each layer</h2>"
        '<p class="quiet">A bar per layer, block by block: the squared error of what it returns as a share of that '
        "squared, on tokens of the calibration, in the worst range of noise levels; by powers of ten, so that a line "
        "lower is ten times less. The strip below has the bits of its weights. A bar tells its name when pointed "
        "at.</p>"
        f'<div class="key">{key}<span><i style="background:#d6d3d1"></i>4 bits</span>'
        f'<span><i style="background:#44403c"></i>8 bits</span></div>{_chart(layers)}'
    )


def _chart(layers: Sequence[Mapping[str, Any]]) -> str:
    """Return an SVG: a bar per layer, its height the logarithm of its error, and a strip of bits."""
    errors = [worst_error(layer) for layer in layers]
    known = [error for error in errors if error]
    if not known:
        return "<p>No errors were measured.</p>"
    low, high = math.floor(math.log10(min(known)) - 0.1), math.ceil(math.log10(max(known)) + 1e-9)
    high = max(high, low + 1)
    width = (CHART_WIDTH - LEFT - 8) / len(layers)
    floor = CHART_HEIGHT - BOTTOM - STRIP
    parts = []
    for power in range(low, high + 1):
        y = floor - (power - low) / (high - low) * (floor - 12)
        parts.append(f'<line x1="{LEFT}" x2="{CHART_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e7e5e4"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" {LABEL}>{10.0**power:g}</text>')
    parts.append(f'<text x="{LEFT - 6}" y="{floor + STRIP - 1}" text-anchor="end" {LABEL}>bits</text>')
    for first, last, name in _blocks(layers):
        x, end = LEFT + first * width - 0.09 * width, LEFT + (last + 1) * width - 0.09 * width
        parts.append(f'<line x1="{x:.2f}" x2="{x:.2f}" y1="12" y2="{CHART_HEIGHT - 2}" stroke="#a8a29e"/>')
        if end - x > 9 * len(name):
            parts.append(f'<text x="{x + 4:.2f}" y="{CHART_HEIGHT - 5}" {LABEL}>{html.escape(name)}</text>')
    for index, (layer, error) in enumerate(zip(layers, errors, strict=True)):
        x = LEFT + index * width
        height = 0.0 if not error else (math.log10(error) - low) / (high - low) * (floor - 12)
        what = "no tokens seen" if error is None else f"error {error:.2g}"
        name = html.escape(f"{layer['path']}: {layer['weight_bits']} bits, {what}")
        bar = max(width * 0.82, 0.6)
        parts.append(
            f'<g><title>{name}</title><rect x="{x:.2f}" y="{floor - height:.1f}" width="{bar:.2f}" '
            f'height="{height:.1f}" fill="{COLOURS[layer["role"]]}"/>'
            f'<rect x="{x:.2f}" y="{floor + 6}" width="{bar:.2f}" height="{STRIP - 4}" '
            f'fill="{"#44403c" if layer["weight_bits"] == 8 else "#d6d3d1"}"/></g>'
        )
    size = f"0 0 {CHART_WIDTH} {CHART_HEIGHT}"
    return f'<svg viewBox="{size}" role="img" aria-label="error and bits of each layer">{"".join(parts)}</svg>'


def _blocks(layers: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, str]]:
    """Return each block's first and last place among the layers, and what to call it: its number."""
    found: list[tuple[int, int, str]] = []
    before = ""
    for index, layer in enumerate(layers):
        block = re.match(r"(.*?\.\d+)\.", layer["path"])
        name = block[1] if block else layer["path"]
        if name == before:
            found[-1] = (found[-1][0], index, found[-1][2])
        else:
            found.append((index, index, f"block {name.rpartition('.')[2]}"))
        before = name
    return found


def _groups(report: Mapping[str, Any]) -> str:
    if not report["groups"]:
        return ""
    rows = "".join(
        f"<tr><td>{role}</td><td>{html.escape(group['serves'])}</td>"
        + "".join(f"<td>{_number(error)}</td>" for error in group["error_per_range"])
        + f"<td>{_number(group['error'])}</td>"
        + f"<td>{100 * group['weights_of_8_bits'] / group['weights']:.0f} %</td></tr>"
        for role, group in report["groups"].items()
    )
    num_ranges = len(next(iter(report["groups"].values()))["error_per_range"])
    ranges = "".join(f"<th>range {index + 1}</th>" for index in range(num_ranges))
    return (
        '<h2>Groups</h2><p class="quiet">What each group serves, and how much of it is off with the group alone at '
        "4 bits, per range of noise levels, the noisiest first, and in all. A group gets 8 bits in proportion to its "
        f'error in all.</p><div class="scroll"><table><tr><th></th><th>serves</th>{ranges}'
        f"<th>in all</th><th>of 8 bits</th></tr>{rows}"
        "</table></div>"
    )


def _scores(report: Mapping[str, Any]) -> str:
    score = report["score"]
    if score is None:
        return ""
    names = list(score["before"])
    rows = "".join(
        f"<tr><td>{when}</td>" + "".join(f"<td>{100 * score[when][name]:.1f}</td>" for name in names) + "</tr>"
        for when in ("before", "after")
    )
    few = f'<p class="quiet">One prompt is {100 / score["prompts"]:.1f} points.</p>' if score["prompts"] < 100 else ""
    heads = "".join(f"<th>{name}</th>" for name in names)
    return f"<h2>Toyland's score, in %</h2><table><tr><th></th>{heads}</tr>{rows}</table>{few}"


def _videos(report: Mapping[str, Any], videos: Sequence[tuple[str, Frames, Frames]]) -> str:
    if not videos:
        return ""
    figures = []
    for (prompt, before, after), told in zip(videos[:SHOWN_VIDEOS], report["comparison"]["videos"], strict=False):
        figures.append(
            f"<figure><figcaption>{html.escape(prompt)} "
            f'<span class="quiet">seed {told["seed"]}, PSNR {told["psnr"]:.1f} dB, SSIM {told["ssim"]:.3f}</span>'
            f'</figcaption><div class="row"><span>original</span>{_image(before, "original frames")}</div>'
            f'<div class="row"><span>quantized</span>{_image(after, "quantized frames")}</div></figure>'
        )
    seconds = report["comparison"]["denoise_seconds"]
    return (
        "<h2>Videos</h2>"
        f'<p class="quiet">{len(videos)} compared; denoising took {seconds["before"]:.1f} s with the original and '
        f"{seconds['after']:.1f} s quantized. These are the first, {SHOWN_FRAMES} frames of each.</p>"
        + "".join(figures)
    )


def _details(report: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(layer['path'])}</td><td>{layer['inputs']} × {layer['outputs']}</td>"
        f"<td>{layer['weight_bits']}</td><td>{layer['bits_per_weight']:.2f}</td>"
        + "".join(f"<td>{_number(error)}</td>" for error in layer["error_per_range"])
        + "</tr>"
        for layer in report["layers"]
    )
    num_ranges = len(report["layers"][0]["error_per_range"]) if report["layers"] else 0
    ranges = "".join(f"<th>range {index + 1}</th>" for index in range(num_ranges))
    kept = "".join(f"<li>{html.escape(path)}</li>" for path in report["kept"])
    prompts = "".join(f"<li>{html.escape(prompt)}</li>" for prompt in report["calibration"]["prompts"])
    return (
        "<h2>Details</h2>"
        "<details><summary>Every layer, with its error per range of noise levels, the noisiest first; a range that "
        'no step was in has none</summary><div class="scroll"><table><tr><th>layer</th><th>inputs × outputs</th>'
        f"<th>bits</th><th>with scales</th>{ranges}</tr>{rows}</table></div></details>"
        f"<details><summary>Linear layers that stay as they were ({len(report['kept'])})</summary><ul>{kept}</ul>"
        f"</details><details><summary>Calibration: {report['calibration']['evaluations']} evaluations of the model, "
        f"{report['calibration']['steps']} steps for each prompt</summary><ul>{prompts}</ul></details>"
    )


def _number(error: float | None) -> str:
    return "" if error is None else f"{error:.2g}"


def _image(frames: Frames, alt: str) -> str:
    """Return evenly spaced frames side by side as an image inside the page."""
    import numpy as np
    from PIL import Image

    picks = np.linspace(0, len(frames) - 1, min(SHOWN_FRAMES, len(frames))).round().astype(int)
    picture = Image.fromarray(np.concatenate([frames[pick] for pick in picks], axis=1))
    if picture.height > 2 * FRAME_HEIGHT:
        picture = picture.resize((picture.width * 2 * FRAME_HEIGHT // picture.height, 2 * FRAME_HEIGHT))
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=90)
    return f'<img alt="{alt}" src="data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}">'
