"""What quantization is worth on this machine: the same work in bfloat16 and in every scheme, in turns."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vgen import backbones, checkpoints, quantization, runtime
from vgen.errors import UsageError
from vgen.pipelines.bench import check_memory, in_turns
from vgen.plan import Plan, plan
from vgen.quantization import layers
from vgen.request import GenerateRequest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vgen.runtime import Runtime

# Wan 2.1 1.3B: attention and feed-forward, inputs and outputs.
SHAPES = ((1536, 1536), (1536, 8960), (8960, 1536))
TOKENS = (1024, 8192)
PROMPT = "a red ball bounces on the grass"


def bench_quantize(
    *,
    schemes: Sequence[str],
    tokens: Sequence[int],
    repeats: int,
    model: str | None,
    device: str,
    compiled: bool = False,
    on_progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Return median seconds of linear layers of `SHAPES` and, with a `model`, of denoising one of its videos.

    With `compiled` the blocks of that model are compiled, in bfloat16, too.

    All variants take turns, so that whatever else the machine does slows down all of them; the reference is bfloat16.
    Raises `UsageError` for schemes that do not exist and numbers below 1.
    """
    for scheme in schemes:
        quantization.parse(scheme)
    if repeats < 1 or min(tokens, default=1) < 1:
        raise UsageError(
            f"There is nothing to measure in {repeats} turns of {min(tokens, default=1)} tokens.",
            tip="give --repeats and --tokens of 1 or more.",
        )
    import torch

    if compiled:
        runtime.check_compiler()
    chosen = runtime.choose(device, "bfloat16")
    # The widest layer's input and output, made in float32.
    check_memory(max(tokens, default=0) * 4 * max(map(sum, SHAPES)), chosen.device)
    made = None
    if model is not None:
        made = plan(GenerateRequest(prompt=PROMPT, model=model, seed=1), checkpoints.resolve(model))
    found: dict[str, Any] = {
        "machine": {
            "device": chosen.device,
            "name": device_name(chosen),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "arithmetic": {scheme: quantization.arithmetic(scheme, chosen.device) for scheme in schemes},
        "repeats": repeats,
        "linear": [],
    }
    with torch.inference_mode():
        for num_tokens in tokens:
            for shape in SHAPES:
                on_progress(f"{num_tokens} tokens, {shape[0]} to {shape[1]} ...")
                found["linear"].append(_linear(num_tokens, shape, schemes, repeats, chosen))
        if made is not None:
            found["run"] = _run(made, schemes, repeats, replace(chosen, compile=compiled), on_progress)
    return found


def device_name(chosen: Runtime) -> str:
    """Return what the system calls the processor or the GPU."""
    import torch

    if chosen.device.startswith("cuda"):
        return torch.cuda.get_device_name(chosen.device)
    return str(torch.cpu.get_capabilities().get("cpu_name", platform.processor()))


def _linear(
    num_tokens: int, shape: tuple[int, int], schemes: Sequence[str], repeats: int, chosen: Runtime
) -> dict[str, Any]:
    import torch

    from vgen.quantization.linear import QuantizedLinear

    torch.manual_seed(0)
    x = torch.randn(num_tokens, shape[0]).to(chosen.device, chosen.torch_dtype)
    plain = torch.nn.Linear(*shape).to(chosen.device, chosen.torch_dtype)
    variants: dict[str, nn.Module] = {"bfloat16": plain}
    for text in schemes:
        scheme = quantization.parse(text)
        variants[text] = QuantizedLinear.of(
            plain, scheme.format(scheme.weight_bits), name=text, act_max=x.abs().amax(0), alpha=scheme.alpha
        ).to(chosen.device)

    def call(module: nn.Module) -> Callable[[], Tensor]:
        return lambda: module(x)

    seconds = in_turns({name: call(module) for name, module in variants.items()}, repeats, chosen)
    weights = shape[0] * shape[1]
    bytes_of = {
        name: module.num_bytes() if isinstance(module, QuantizedLinear) else 2 * weights
        for name, module in variants.items()
    }
    return {
        "tokens": num_tokens,
        "inputs": shape[0],
        "outputs": shape[1],
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
        "speedup": {name: round(seconds["bfloat16"] / value, 3) for name, value in seconds.items()},
        "bytes_share": {name: round(value / (2 * weights), 4) for name, value in bytes_of.items()},
    }


def _run(
    made: Plan, schemes: Sequence[str], repeats: int, chosen: Runtime, on_progress: Callable[[str], None]
) -> dict[str, Any]:
    """Return the median seconds of denoising one video of a model at its defaults; weights are not calibrated."""
    import torch

    from vgen.pipelines import text_to_video
    from vgen.quantization.linear import QuantizedLinear

    checkpoint, model = made.checkpoint, made.model
    variants = {}
    for text in ("bfloat16", *schemes):
        on_progress(f"{model}: {text} ...")
        backbone = variants[text] = backbones.load(checkpoint, chosen)
        if text == "bfloat16":
            continue
        scheme = quantization.parse(text)
        chosen_layers = [layer for layer in layers.of(backbone.checkpoint) if layer.role]
        format = scheme.format(scheme.weight_bits)
        layers.check_divides(chosen_layers, format)
        for layer in chosen_layers:
            plain = layers.linear(backbone, layer)
            ones = torch.ones(layer.in_features, device=chosen.device)
            quantized = QuantizedLinear.of(plain, format, name=layer.path, act_max=ones, alpha=scheme.alpha)
            layers.replace(backbone, layer, quantized)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(repeats + 1):
        on_progress(f"{model}: turn {index + 1} of {repeats + 1} ...")
        for name, backbone in variants.items():
            times[name].append(text_to_video.generate(made, backbone).timings["denoise"])
    # The first turn warms up.
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {
        "model": checkpoint.anchored_name,
        "steps": made.num_inference_steps,
        "compiled": chosen.compile,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "speedup": {name: round(seconds["bfloat16"] / value, 3) for name, value in seconds.items()},
    }
