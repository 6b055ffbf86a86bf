"""What a request of a quantization becomes: layers, formats, sizes, and the videos to make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import vgen
from vgen import backbones, batch, checkpoints, integrity, manifest, quantization, runtime
from vgen.checkpoints import Checkpoint
from vgen.errors import UsageError, VgenError
from vgen.plan import Plan
from vgen.plan import plan as planned
from vgen.quantization import LayerFormat, Scheme, export, layers
from vgen.quantization.export import Sizes
from vgen.quantization.layers import Layer
from vgen.quantization.request import STEPS, QuantizeRequest, read_limits
from vgen.request import GenerateRequest
from vgen.toyland.prompts import Prompt, held_out

STREAM_ABOVE = 0.7  # of the free memory: what the rest of a model and its activations leave for weights


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
    return planned(
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
