"""What a quantization has cost, as a report: sizes, errors of layers, and what the compared videos tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import vgen
from vgen import manifest, quantization
from vgen.quantization import LayerFormat, export
from vgen.quantization.export import Sizes
from vgen.quantization.layers import Layer
from vgen.quantization.plan import QuantizePlan
from vgen.toyland.prompts import truth

if TYPE_CHECKING:
    from vgen.backbones import Backbone
    from vgen.quantization.calibration import Statistics
    from vgen.video import Frames


@dataclass(frozen=True, kw_only=True)
class Made:
    """Compared videos, by one of the two models: frames uint8 [F, H, W, 3] and the seconds of denoising of each."""

    frames: list[Frames] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


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
                "error_per_range": json_safe(measured["errors"][layer.path]),
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


def sizes_of(report: Mapping[str, Any]) -> Sizes:
    """Return the sizes that a report tells."""
    return Sizes(**{name: report["bytes"][name] for name in ("layers_before", "layers_after", "before", "after")})


def sentences(report: Mapping[str, Any]) -> list[str]:
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


def pairs(plan: QuantizePlan, before: Made, after: Made) -> list[tuple[str, Frames, Frames]]:
    return [
        (video.prompt, one, other)
        for video, one, other in zip(plan.comparison, before.frames, after.frames, strict=True)
    ]


def json_safe(errors: Sequence[float]) -> list[float | None]:
    """Return errors with None where nothing was seen: JSON has no NaN."""
    return [None if math.isnan(error) else float(f"{error:.4g}") for error in errors]
