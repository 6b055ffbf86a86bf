"""From a model to a quantized one: calibrate, choose bits, quantize, compare, report, write."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vgen import backbones, files, runtime
from vgen.errors import VgenError
from vgen.pipelines import quantize_report as reports
from vgen.pipelines.quantize_report import Made, json_safe
from vgen.pipelines.run import Watch
from vgen.quantization import LayerFormat, export, layers
from vgen.quantization.layers import Layer
from vgen.quantization.plan import QuantizePlan
from vgen.quantization.unfinished import Unfinished

if TYPE_CHECKING:
    from vgen.backbones import Backbone
    from vgen.quantization.calibration import Statistics

REPORT, PAGE = "report.json", "report.html"


def quantize(plan: QuantizePlan, *, watch: Watch) -> dict[str, Any]:
    """Quantize, compare and write the export, and return the report, which is in its folder as JSON and as a page.

    What is done is kept beside the output, and a run that was stopped goes on there. Raises `VgenError` where the
    export loses more than `limits` allow; the report is beside its folder then, and what was done is kept.
    """
    unfinished = Unfinished(plan.request.output, plan.asked, force=plan.request.force)
    try:
        return _quantize(plan, unfinished, watch)
    except KeyboardInterrupt as interrupt:
        kept = f"What is done is kept in {unfinished.folder}, and the same command goes on there."
        raise KeyboardInterrupt("" if unfinished.is_empty else kept) from interrupt
    finally:
        if unfinished.is_empty:
            unfinished.remove()


def _quantize(plan: QuantizePlan, unfinished: Unfinished, watch: Watch) -> dict[str, Any]:
    if unfinished.goes_on:
        watch.on_note(f"Going on with what {unfinished.folder} has.")
    watch.on_stage("load")
    chosen = runtime.choose(plan.request.device, plan.request.dtype)
    backbone = backbones.load(plan.checkpoint, chosen, progress=watch.download)
    watch.on_stage("calibrate")
    statistics = calibrate(backbone, plan, watch, unfinished)
    watch.on_stage("compare")
    before = make(backbone, plan, "before", watch, unfinished)
    watch.on_stage("quantize")
    formats, measured = quantize_layers(backbone, plan, statistics, watch, unfinished)
    watch.on_stage("compare")
    after = make(backbone, plan, "after", watch, unfinished)
    watch.on_stage("report")
    report = reports.account(plan, backbone, formats, measured, statistics, before, after)
    refused = reports.exceeded(plan.limits, report)
    from vgen.quantization import page

    html = page.render(report, reports.pairs(plan, before, after))
    output = plan.request.output
    if refused:
        for name, text in ((REPORT, json.dumps(report, indent=1) + "\n"), (PAGE, html)):
            files.write_text(output.with_name(f"{output.name}.{name}"), text)
        raise VgenError(
            f"{output} was not written: {'; '.join(refused)}.",
            tip=f"{output.name}.{PAGE} shows what was lost where; try a scheme of more bits, or another --max-loss, "
            f"for which nothing is done twice: all is kept in {unfinished.folder}.",
        )
    watch.on_stage("write")
    readme = export.model_card(
        plan.checkpoint,
        plan.request.scheme,
        formats.values(),
        reports.sizes_of(report),
        reports.sentences(report),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic(output) as part:
        kept = {"scheme": plan.request.scheme, "layers": report["layers"], "groups": report["groups"]}
        export.write(
            part,
            backbone,
            formats,
            scheme=plan.request.scheme,
            plan={**kept, "kept": report["kept"]},
            readme=readme,
        )
        (part / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (part / PAGE).write_text(html, encoding="utf-8")
    unfinished.remove()
    return report


def calibrate(
    backbone: Backbone, plan: QuantizePlan, watch: Watch, unfinished: Unfinished | None = None
) -> Statistics:
    """Return what the layers see while the calibration's videos are made, those aside that were seen before."""
    from vgen.pipelines import text_to_video
    from vgen.quantization.calibration import Statistics, observing

    statistics, num_seen = (Statistics(), 0) if unfinished is None else unfinished.statistics()
    if num_seen and plan.scheme.average_bits is not None and (unfinished is None or unfinished.bits() is None):
        # What is repeated for mixed precision is of the first video, whose noise levels are those of all.
        with observing(backbone, (), Statistics(calls=statistics.calls)) as observed:
            text_to_video.generate(plan.calibration[0], observed)
    total = len(plan.calibration)
    for index, video in enumerate(plan.calibration[num_seen:], start=num_seen):
        with observing(backbone, plan.layers, statistics) as observed:

            def on_step(step: int, num_steps: int, index: int = index) -> None:
                watch.on_step(index * num_steps + step, total * num_steps)

            text_to_video.generate(video, observed, on_step=on_step, on_warning=watch.on_warning)
        if unfinished is not None:
            unfinished.keep_statistics(statistics, index + 1)
    return statistics


def quantize_layers(
    backbone: Backbone,
    plan: QuantizePlan,
    statistics: Statistics,
    watch: Watch,
    unfinished: Unfinished | None = None,
) -> tuple[dict[Layer, LayerFormat], dict[str, Any]]:
    """Put quantized layers in the place of the backbone's, one by one, and return their formats and what was measured.

    That is `errors`, per layer's path the relative squared error of its outputs per range of noise levels, and for a
    scheme of mixed precision `groups`. LoRAs are a part of the weights, and so quantized with them. Where a run can go
    on, each layer is written when it is done, and on a CPU used from its file.
    """
    import torch

    from vgen.quantization import precision

    scheme = plan.scheme
    formats = dict(plan.formats)
    measured: dict[str, Any] = {"errors": {}, "groups": {}}
    with torch.inference_mode():
        if scheme.average_bits is not None:
            formats, measured["groups"] = mixed(backbone, plan, statistics, unfinished)
        for index, layer in enumerate(plan.layers):
            linear = layers.linear(backbone, layer)
            kept = None if unfinished is None else unfinished.layer(layer, linear, formats[layer])
            if kept is None:
                made = precision.quantize_layer(layer, linear, scheme, formats[layer], statistics)
                tokens = statistics.tokens_to_check(layer)
                errors = precision.output_error(linear, made, tokens)
                if unfinished is not None:
                    unfinished.keep_layer(layer, made, errors)
                    kept = unfinished.layer(layer, linear, formats[layer])
            made, errors = kept or (made, errors)
            measured["errors"][layer.path] = errors
            layers.replace(backbone, layer, made)
            watch.on_step(index + 1, len(plan.layers))
    return formats, measured


def mixed(
    backbone: Backbone, plan: QuantizePlan, statistics: Statistics, unfinished: Unfinished | None = None
) -> tuple[dict[Layer, LayerFormat], dict[str, Any]]:
    """Return each layer's format in a scheme of mixed precision, and what the groups were measured by."""
    from vgen.quantization import precision
    from vgen.quantization.scheme import WEIGHT_BITS

    scheme = plan.scheme
    assert scheme.average_bits is not None
    if unfinished is not None and (known := unfinished.bits()) is not None:
        return {layer: scheme.format(known["bits"][layer.path]) for layer in plan.layers}, known["groups"]
    served = precision.group_errors(backbone, plan.layers, scheme, statistics)
    errors: dict[Layer, dict[int, float]] = {}
    for layer in plan.layers:
        linear = layers.linear(backbone, layer)
        errors[layer] = {}
        for bits in WEIGHT_BITS:
            made = precision.quantize_layer(layer, linear, scheme, scheme.format(bits), statistics)
            tokens = statistics.tokens_to_check(layer)
            errors[layer][bits] = precision.worst(precision.output_error(linear, made, tokens))
    groups = {role: found.in_all for role, found in served.items()}
    bits_of = precision.choose_bits(plan.layers, scheme.average_bits, groups, errors)
    described = {
        role: {
            "serves": precision.SERVES[role],
            "error": float(f"{found.in_all:.4g}"),
            "error_per_range": json_safe(found.per_range),
            "weights": sum(layer.num_weights for layer in plan.layers if layer.role == role),
            "weights_of_8_bits": sum(
                layer.num_weights for layer in plan.layers if layer.role == role and bits_of[layer] == 8
            ),
        }
        for role, found in served.items()
    }
    if unfinished is not None:
        unfinished.keep_bits({"bits": {layer.path: bits for layer, bits in bits_of.items()}, "groups": described})
    return {layer: scheme.format(bits) for layer, bits in bits_of.items()}, described


def make(backbone: Backbone, plan: QuantizePlan, name: str, watch: Watch, unfinished: Unfinished) -> Made:
    """Return the compared videos, "before" or "after", those aside that were made in a run before."""
    from vgen.pipelines import text_to_video

    made = Made()
    for index, video in enumerate(plan.comparison):
        place = f"{name}-{index:03d}"
        found = unfinished.video(place)
        if found is None:
            generation = text_to_video.generate(video, backbone)
            found = generation.frames, generation.timings["denoise"]
            unfinished.keep_video(place, *found)
        made.frames.append(found[0])
        made.seconds.append(found[1])
        watch.on_step(index + 1, len(plan.comparison))
    return made


def least_seconds(plan: QuantizePlan) -> float:
    """Return what the layers' multiplications take on the device, as a short trial of one of them tells."""
    import time

    import torch

    chosen = runtime.choose(plan.request.device, plan.request.dtype)
    one = torch.randn(1024, 1024, device=chosen.device).to(chosen.torch_dtype)
    one @ one
    runtime.synchronize(chosen)
    start = time.perf_counter()
    for _ in range(5):
        one @ one
    runtime.synchronize(chosen)
    return plan.num_operations * (time.perf_counter() - start) / (5 * 2 * 1024**3)
