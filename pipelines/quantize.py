"""From a model to a quantized one: calibrate, choose bits, quantize, compare, report, write."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vgen
from vgen import backbones, batch, checkpoints, files, integrity, manifest, quantization, request, runtime
from vgen.checkpoints import Checkpoint
from vgen.errors import UsageError, VgenError, did_you_mean
from vgen.pipelines.run import Watch
from vgen.quantization import LayerFormat, Scheme, export, layers
from vgen.quantization.export import Sizes
from vgen.quantization.layers import Layer
from vgen.quantization.unfinished import Unfinished
from vgen.request import GenerateRequest, Plan
from vgen.toyland.prompts import Prompt, held_out, truth

if TYPE_CHECKING:
    from vgen.backbones import Backbone
    from vgen.quantization.calibration import Statistics
    from vgen.video import Frames

REPORT, PAGE = "report.json", "report.html"
STEPS = 10  # of a video that is made to calibrate
STREAM_ABOVE = 0.7  # of the free memory: what the rest of a model and its activations leave for weights
# What `--max-loss` may limit, what its numbers mean, and the most that they can be.
LIMITS = {
    "score": ("points of Toyland's joint score", 100.0),
    "psnr": ("dB at least", math.inf),
    "ssim": ("SSIM at least", 1.0),
}


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """What is asked for; `scheme` as `vgen.quantization.parse` reads it.

    `calibration` is a file of prompts (None: the built-in ones), of which `samples` videos of `steps` steps are made
    (None: `STEPS`, or what a few-step student has). `compare` videos are made before and after. Each `lora`, as
    `vgen.loras.asked` reads it, is merged before. `image` is the first frame for models that need one, and `max_loss`
    as `read_limits` reads it. With `stream` the weights stay on the disk, one in memory at a time; None: where they
    do not fit into it.
    """

    model: str
    scheme: str
    output: Path
    calibration: Path | None = None
    samples: int = 8
    steps: int | None = None
    compare: int = 4
    lora: tuple[str, ...] | None = None
    image: Path | None = None
    max_loss: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    stream: bool | None = None
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class QuantizePlan:
    """What will be done: the scheme as options were read, the layers that it is for, and the videos.

    `kept` are the paths of linear layers that stay as they are, `prompts` the held-out ones of Toyland that the
    compared videos are of, empty for models of anything else. `formats` are those of the fewest bits.
    """

    request: QuantizeRequest
    scheme: Scheme
    checkpoint: Checkpoint
    layers: tuple[Layer, ...]
    kept: tuple[str, ...]
    formats: Mapping[Layer, LayerFormat]
    sizes: Sizes
    calibration: tuple[Plan, ...]
    comparison: tuple[Plan, ...]
    prompts: tuple[Prompt, ...]
    limits: Mapping[str, float]

    @property
    def asked(self) -> dict[str, Any]:
        """All that intermediate results depend on, for `Unfinished`."""

        def videos(plans: Sequence[Plan]) -> list[Any]:
            return [[plan.prompt, plan.seed, plan.num_inference_steps] for plan in plans]

        wanted = self.request
        return {
            "vgen": vgen.__version__,
            "model": manifest.identity(self.checkpoint),
            "scheme": wanted.scheme,
            "calibration": videos(self.calibration),
            "comparison": videos(self.comparison),
            "image": None if wanted.image is None else integrity.sha256(wanted.image),
            "device": wanted.device,
            "dtype": wanted.dtype,
        }

    @property
    def num_evaluations(self) -> int:
        """How often the transformer runs, comparing counted twice, for it is done before and after."""

        def evaluations(plan: Plan) -> int:
            return plan.num_inference_steps * (2 if plan.cfg_scale > 1 else 1)

        return sum(map(evaluations, self.calibration)) + 2 * sum(map(evaluations, self.comparison))

    @property
    def num_operations(self) -> float:
        """How many operations those take in the layers that are quantized: attention and decoding come on top."""

        def tokens(plan: Plan) -> int:
            rules = plan.checkpoint.rules
            side = rules.size_multiple**2
            return ((plan.num_frames - 1) // rules.frame_multiple + 1) * plan.height * plan.width // side

        work = [(plan, 1) for plan in self.calibration] + [(plan, 2) for plan in self.comparison]
        weights = sum(layer.num_weights for layer in self.layers if layer.component == "transformer")
        return sum(
            2.0 * weights * tokens(plan) * plan.num_inference_steps * (2 if plan.cfg_scale > 1 else 1) * times
            for plan, times in work
        )


@dataclass(frozen=True, kw_only=True)
class Made:
    """Compared videos, by one of the two models: frames uint8 [F, H, W, 3] and the seconds of denoising of each."""

    frames: list[Frames] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def check(asked: QuantizeRequest, checkpoint: Checkpoint) -> None:
    """Raise `VgenError` for what is wrong whatever the checkpoint's files hold, before they are downloaded."""
    backbones.require_runnable(checkpoint)
    quantization.parse(asked.scheme)
    runtime.check_names(asked.device, asked.dtype)
    _calibration_prompts(asked)
    if read_limits(asked.max_loss) and not asked.compare:
        raise UsageError("--max-loss needs videos to compare.", tip="give --compare 4.")
    if asked.output.exists() and not (asked.force and (asked.output / checkpoints.CARD).is_file()):
        tip = "choose another --output" + (", or pass --force." if not asked.force else ": --force replaces exports.")
        raise VgenError(f"{asked.output} exists already.", tip=tip)
    for name, value in (("samples", asked.samples), ("steps", asked.steps)):
        if value is not None and not 1 <= value <= 1000:
            raise UsageError(f"{value} {name} are not possible.", tip=f"choose --{name} from 1 to 1000.")
    most = len(held_out())
    if not 0 <= asked.compare <= most:
        raise UsageError(f"{asked.compare} videos cannot be compared.", tip=f"choose --compare from 0 to {most}.")


def plan(asked: QuantizeRequest, checkpoint: Checkpoint) -> QuantizePlan:
    """Return what will be done with a checkpoint whose files are here, checked before anything heavy is loaded.

    Raises `UsageError` for what is not possible, and `VgenError` where the disk has no room or the output exists.
    """
    export.check_parent(checkpoint)
    check(asked, checkpoint)
    scheme, limits = quantization.parse(asked.scheme), read_limits(asked.max_loss)
    prompts = _calibration_prompts(asked)
    found = layers.of(checkpoint)
    chosen = [layer for layer in found if layer.role]
    format = scheme.format(scheme.weight_bits)
    layers.check_divides(chosen, format)
    streamed = _streams(asked, chosen)
    formats = dict.fromkeys(chosen, format)
    sizes = export.sizes(checkpoint, chosen, _likely(formats, scheme))
    # What is done so far is there beside the export that is written of it.
    export.check_space(asked.output, sizes.after + sizes.layers_after)
    compared = _compared_prompts(asked, checkpoint)
    texts = [prompt.text for prompt in compared] or [prompts[index % len(prompts)] for index in range(asked.compare)]
    if "score" in limits and len(compared) < 1:
        raise UsageError(
            f'"{checkpoint.name}" has no score: it does not know Toyland.',
            tip="limit psnr or ssim: --max-loss psnr=30.",
        )
    steps = asked.steps or (None if checkpoint.defaults.timesteps else STEPS)
    calibration = tuple(
        _video(asked, checkpoint, prompts[index % len(prompts)], asked.seed + index, steps)
        for index in range(asked.samples)
    )
    return QuantizePlan(
        request=asked,
        scheme=scheme,
        # With the LoRAs that were asked for.
        checkpoint=replace(calibration[0].checkpoint, streamed=streamed),
        layers=tuple(chosen),
        kept=tuple(layer.path for layer in found if not layer.role),
        formats=formats,
        sizes=sizes,
        calibration=calibration,
        comparison=tuple(
            _video(asked, checkpoint, text, asked.seed + index, None) for index, text in enumerate(texts)
        ),
        prompts=tuple(compared),
        limits=limits,
    )


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
    report = account(plan, backbone, formats, measured, statistics, before, after)
    refused = exceeded(plan.limits, report)
    from vgen.quantization import page

    html = page.render(report, _pairs(plan, before, after))
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
        plan.checkpoint, plan.request.scheme, formats.values(), report_sizes(report), _sentences(report)
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
                tokens = statistics.tokens.get(layer.path, {})
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
            tokens = statistics.tokens.get(layer.path, {})
            errors[layer][bits] = precision.worst(precision.output_error(linear, made, tokens))
    groups = {role: found.in_all for role, found in served.items()}
    bits_of = precision.choose_bits(plan.layers, scheme.average_bits, groups, errors)
    described = {
        role: {
            "serves": precision.SERVES[role],
            "error": float(f"{found.in_all:.4g}"),
            "error_per_range": _json_safe(found.per_range),
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


def account(
    plan: QuantizePlan,
    backbone: Backbone,
    formats: Mapping[Layer, LayerFormat],
    measured: Mapping[str, Any],
    statistics: Statistics,
    before: Made,
    after: Made,
) -> dict[str, Any]:
    """Return the report: sizes, bits and errors of the layers, and what the videos tell."""
    sizes = export.sizes(plan.checkpoint, plan.layers, formats)
    format = plan.scheme.format(plan.scheme.weight_bits)
    return {
        "vgen": vgen.__version__,
        "versions": manifest.versions(),
        "model": plan.checkpoint.anchored_name,
        "parent": manifest.identity(backbone.checkpoint),
        "scheme": plan.request.scheme,
        "activation_bits": format.activation_bits,
        "device": backbone.runtime.device,
        "dtype": backbone.runtime.dtype,
        "arithmetic": quantization.arithmetic(plan.request.scheme, backbone.runtime.device),
        "bytes": sizes.to_dict(),
        "bits_per_weight": round(16 * sizes.share, 3),
        "calibration": {
            "prompts": [video.prompt for video in plan.calibration],
            "steps": plan.calibration[0].num_inference_steps,
            "evaluations": statistics.num_evaluations,
        },
        "groups": measured["groups"],
        "layers": [
            {
                "path": layer.path,
                "role": layer.role,
                "inputs": layer.in_features,
                "outputs": layer.out_features,
                "weight_bits": formats[layer].weight_bits,
                "bits_per_weight": round(formats[layer].bits_per_weight(layer.in_features, layer.out_features), 3),
                "error_per_range": _json_safe(measured["errors"][layer.path]),
            }
            for layer in plan.layers
        ],
        "kept": list(plan.kept),
        "comparison": compared(plan, before, after),
        "score": scores(plan, before, after),
    }


def compared(plan: QuantizePlan, before: Made, after: Made) -> dict[str, Any] | None:
    """Return PSNR and SSIM of each video against the original's of the same seed, their means, and both speeds."""
    import torch

    from vgen.metrics.fidelity import psnr, ssim

    if not plan.comparison:
        return None
    videos: list[dict[str, Any]] = []
    for index, video in enumerate(plan.comparison):
        one, other = (torch.from_numpy(made.frames[index]) for made in (before, after))
        videos.append(
            {
                "prompt": video.prompt,
                "seed": video.seed,
                "psnr": round(psnr(one, other), 2),
                "ssim": round(ssim(one, other), 4),
                "denoise_seconds": {
                    "before": round(before.seconds[index], 3),
                    "after": round(after.seconds[index], 3),
                },
            }
        )
    return {
        "psnr": round(sum(one["psnr"] for one in videos) / len(videos), 2),
        "ssim": round(sum(one["ssim"] for one in videos) / len(videos), 4),
        "denoise_seconds": {"before": round(sum(before.seconds), 3), "after": round(sum(after.seconds), 3)},
        "speedup": round(sum(before.seconds) / sum(after.seconds), 3),
        "videos": videos,
    }


def scores(plan: QuantizePlan, before: Made, after: Made) -> dict[str, Any] | None:
    """Return Toyland's score of both models' videos; None for a model of anything else."""
    if not plan.prompts:
        return None
    from vgen.pipelines.evaluate.scores import read_all, score

    truths = [truth(prompt.clip) for prompt in plan.prompts]
    fps = plan.comparison[0].fps
    found = {name: score(read_all(made.frames, fps), truths) for name, made in (("before", before), ("after", after))}
    return {"prompts": len(truths), **found}


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


def read_limits(text: str | None) -> dict[str, float]:
    """Return the limits of `score=2,psnr=30,ssim=0.9`; a number alone is of the score. Raises `UsageError`."""
    limits: dict[str, float] = {}
    for item in text.split(",") if text is not None else []:
        name, _, value = (part.strip() for part in (item if "=" in item else f"score={item}").partition("="))
        if name not in LIMITS:
            raise UsageError(
                f'There is no loss "{name}".{did_you_mean(name, LIMITS)}', tip=f"choose from {', '.join(LIMITS)}."
            )
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        meaning, most = LIMITS[name]
        if not (math.isfinite(limits[name]) and 0 <= limits[name] <= most):
            upper = f" to {most:g}" if math.isfinite(most) else ""
            raise UsageError(f'"{value}" is no limit for {name}.', tip=f"give a number from 0{upper}: {meaning}.")
    return limits


def exceeded(limits: Mapping[str, float], report: Mapping[str, Any]) -> list[str]:
    """Return, in words, each limit that the measured losses exceed."""
    refused = []
    for name, limit in limits.items():
        if name == "score":
            lost = 100 * (report["score"]["before"]["joint"] - report["score"]["after"]["joint"])
            if lost > limit:
                refused.append(f"it loses {lost:.1f} points of the joint score, and {limit:g} were allowed")
        elif not report["comparison"][name] >= limit:
            unit = " dB" if name == "psnr" else ""
            was = report["comparison"][name]
            refused.append(f"its {name.upper()} is {was:g}{unit}, and {limit:g} was asked for")
    return refused


def report_sizes(report: Mapping[str, Any]) -> Sizes:
    """Return the sizes that a report tells."""
    return Sizes(**{name: report["bytes"][name] for name in ("layers_before", "layers_after", "before", "after")})


def _sentences(report: Mapping[str, Any]) -> list[str]:
    told = []
    if (comparison := report["comparison"]) is not None:
        told.append(
            f"Against the original at the same seeds ({len(comparison['videos'])} videos): PSNR "
            f"{comparison['psnr']:g} dB, SSIM {comparison['ssim']:g}."
        )
    if (score := report["score"]) is not None:
        told.append(
            f"Toyland's joint score over {score['prompts']} prompts: {score['before']['joint']:g} before, "
            f"{score['after']['joint']:g} after."
        )
    return told


def _pairs(plan: QuantizePlan, before: Made, after: Made) -> list[tuple[str, Frames, Frames]]:
    return [
        (video.prompt, one, other)
        for video, one, other in zip(plan.comparison, before.frames, after.frames, strict=True)
    ]


def _likely(formats: Mapping[Layer, LayerFormat], scheme: Scheme) -> Mapping[Layer, LayerFormat]:
    """Return formats of about the size that mixed precision will have: the layers' bits are not known yet."""
    if scheme.average_bits is None:
        return formats
    left = sum(layer.num_weights for layer in formats) * (scheme.average_bits - 4) / 4
    likely = dict(formats)
    for layer in formats:
        if layer.num_weights <= left:
            likely[layer] = scheme.format(8)
            left -= layer.num_weights
    return likely


def _calibration_prompts(asked: QuantizeRequest) -> list[str]:
    if asked.calibration is None:
        from vgen.quantization.prompts import PROMPTS

        return list(PROMPTS)
    lines = batch.read(asked.calibration, {})
    for line in lines:
        if isinstance(line.request, VgenError):
            error = line.request
            raise type(error)(f"{asked.calibration}, line {line.number}: {error.message}", tip=error.tip)
    return [line.request.prompt for line in lines if isinstance(line.request, GenerateRequest)]


def _streams(asked: QuantizeRequest, chosen: Sequence[Layer]) -> bool:
    """Return whether weights stay on the disk: as it was asked for, or else where they take more than what is free."""
    if asked.lora:
        if asked.stream:
            raise UsageError(
                "LoRAs are merged into weights in memory, and --stream leaves these on the disk.",
                tip="leave out --stream, or merge the LoRA into the model's files before.",
            )
        return False
    if asked.stream is not None:
        return asked.stream
    width = 4 if runtime.DTYPES[asked.dtype] == "float32" else 2
    free = (runtime.gpu_memory(asked.device) or runtime.memory("cpu")).free
    return width * sum(layer.num_weights for layer in chosen) > STREAM_ABOVE * free


def _compared_prompts(asked: QuantizeRequest, checkpoint: Checkpoint) -> list[Prompt]:
    """Return Toyland's held-out prompts for a model that knows it: only of one with a limited world is it said."""
    return held_out()[: asked.compare] if checkpoint.knows else []


def _video(asked: QuantizeRequest, checkpoint: Checkpoint, prompt: str, seed: int, steps: int | None) -> Plan:
    return request.plan(
        GenerateRequest(
            prompt=prompt,
            model=asked.model,
            seed=seed,
            num_inference_steps=steps,
            lora=asked.lora,
            image=asked.image,
            device=asked.device,
            dtype=asked.dtype,
        ),
        checkpoint,
    )


def _json_safe(errors: Sequence[float]) -> list[float | None]:
    """Return errors with None where nothing was seen: JSON has no NaN."""
    return [None if math.isnan(error) else float(f"{error:.4g}") for error in errors]
