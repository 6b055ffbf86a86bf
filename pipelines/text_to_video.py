"""From a plan to frames: encode the prompt, denoise, decode."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vgen import files, options
from vgen.conditioning.frames import KnownFrames, first_frame, fit_image, open_image
from vgen.errors import VgenError
from vgen.request import GenerateRequest, Plan
from vgen.runtime import noise_generator, synchronize
from vgen.sampling import SAMPLERS
from vgen.sampling.flow import OnStep
from vgen.sampling.guidance import classifier_free

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vgen.backbones import Backbone

# Called when a stage begins, with its name: "encode", "denoise" or "decode".
OnStage = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished video, its latents, and the seconds that each stage took.

    frames uint8 [F, H, W, 3]; latents float32 [1, C, T, h, w] on the CPU.
    """

    frames: np.ndarray
    latents: Tensor
    timings: dict[str, float]


def generate(
    plan: Plan,
    backbone: Backbone,
    *,
    on_stage: OnStage | None = None,
    on_step: OnStep | None = None,
    on_warning: Callable[[str], None] = lambda message: None,
    save_latents: Callable[[Tensor], None] | None = None,
) -> Generation:
    """Return the video that a plan describes, made by a loaded backbone.

    `on_step(i, n)` is called after step i of n; `on_warning`, before the first, with what the user should know.
    `save_latents` gets the final latents [1, C, T, h, w] before they are decoded, so that nothing is lost when that
    fails. Raises `VgenError` when the result is not finite.
    """
    import torch

    stages = _Stages(backbone, on_stage)
    sampler = options.parse(plan.sampler, SAMPLERS, what="sampler")
    for warning in _prompt_warnings(plan, backbone):
        on_warning(warning)

    with torch.inference_mode():
        with stages("encode"):
            guided = plan.guidance_scale > 1
            text, *negative = backbone.encode_prompt([plan.prompt, plan.negative_prompt] if guided else [plan.prompt])
            known = _known_frames(plan, backbone, on_warning)

        with stages("denoise"):
            shape = (1, *backbone.latent_shape(plan.num_frames, plan.height, plan.width))
            noise = torch.randn(shape, generator=noise_generator(plan.seed)).to(backbone.runtime.device)
            mask = None if known is None else known.mask
            flow = classifier_free(
                lambda latents, sigma, text: backbone.velocity(latents, sigma, text, mask),
                text,
                negative[0] if guided else None,
                plan.guidance_scale,
            )
            sigmas = backbone.sigmas(plan.num_inference_steps)
            latents = sampler(flow if known is None else known.held(flow), noise, sigmas, on_step=on_step)
            latents = latents if known is None else known.hold(latents)

        if not bool(latents.isfinite().all()):
            raise VgenError(
                "The model produced values that are not finite, which would decode to noise.",
                tip="try --dtype float32, another --seed or a lower --guidance-scale.",
            )
        if save_latents is not None:
            save_latents(latents.cpu())
        with stages("decode"):
            frames = backbone.decode(latents)[0].cpu().numpy()
    return Generation(frames=frames, latents=latents.cpu(), timings=stages.timings)


def decode_latents(path: Path, backbone: Backbone, *, on_stage: OnStage | None = None) -> Generation:
    """Return the video of a latents file that `save_latents` wrote; `timings` has "decode" only."""
    import torch

    latents, _ = load_latents(path)
    stages = _Stages(backbone, on_stage)
    with torch.inference_mode(), stages("decode"):
        frames = backbone.decode(latents.to(backbone.runtime.device))[0].cpu().numpy()
    return Generation(frames=frames, latents=latents, timings=stages.timings)


def rebuild(frames: np.ndarray, backbone: Backbone, *, on_stage: OnStage | None = None) -> Generation:
    """Return what the model's VAE leaves of frames uint8 [F, H, W, 3]: the best that the model could make of them."""
    import torch

    stages = _Stages(backbone, on_stage)
    with torch.inference_mode():
        with stages("encode"):
            latents = backbone.encode_frames(torch.tensor(frames)[None])
        with stages("decode"):
            rebuilt = backbone.decode(latents)[0].cpu().numpy()
    return Generation(frames=rebuilt, latents=latents.cpu(), timings=stages.timings)


def save_latents(path: Path, latents: Tensor, plan: Plan) -> None:
    """Write latents [1, C, T, h, w] and the plan that made them as safetensors, all of it or nothing.

    Raises `VgenError` where the disk is full or the folder cannot be written to.
    """
    from safetensors.torch import save

    metadata = {"vgen": "latents", "request": json.dumps(plan.to_dict())}
    content = save({"latents": latents.detach().float().contiguous().cpu()}, metadata)
    with files.atomic(path) as part:
        part.write_bytes(content)


def load_latents(path: Path) -> tuple[Tensor, GenerateRequest]:
    """Return latents float32 [1, C, T, h, w] and the request, every field given, out of a file of `save_latents`.

    Raises `VgenError` for a file that is missing, damaged or not of this kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("vgen") != "latents":
                raise VgenError(
                    f"{path} holds no latents of vgen.", tip="give a file that --keep-latents or a failed run left."
                )
            return file.get_tensor("latents"), GenerateRequest.from_dict(json.loads(metadata["request"]))
    except FileNotFoundError as error:
        raise VgenError(f"There is no file {path}.", tip="check the path.") from error
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise VgenError(
            f"Cannot read the latents in {path}: {error}", tip="the file is damaged; run again."
        ) from error


@dataclass
class _Stages:
    """Announces stages and measures them in wall seconds."""

    backbone: Backbone
    on_stage: OnStage | None
    timings: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.on_stage is not None:
            self.on_stage(name)
        start = time.perf_counter()
        yield
        synchronize(self.backbone.runtime)
        self.timings[name] = time.perf_counter() - start


def _known_frames(plan: Plan, backbone: Backbone, on_warning: Callable[[str], None]) -> KnownFrames | None:
    import torch

    if plan.image is None:
        return None
    image = open_image(plan.image)
    if image.width * plan.height != image.height * plan.width:
        on_warning(
            f"The image is {image.width}x{image.height} and the video {plan.width}x{plan.height}: "
            "the image's edges are cut off."
        )
    frames = torch.tensor(fit_image(image, plan.width, plan.height))[None, None]
    num_latent_frames = backbone.latent_shape(plan.num_frames, plan.height, plan.width)[1]
    return first_frame(backbone.encode_frames(frames), num_latent_frames)


def _prompt_warnings(plan: Plan, backbone: Backbone) -> list[str]:
    warnings = []
    if unknown := backbone.unknown_words(plan.prompt):
        words = ", ".join(f'"{word}"' for word in unknown)
        warnings.append(
            f"The model has never seen {words}. {plan.checkpoint.knows}".rstrip()
            + "\nTip: for anything else use a larger model, --model FOLDER_OR_HUB_ID."
        )
    read = plan.checkpoint.defaults.max_sequence_length
    if (num_tokens := backbone.num_tokens(plan.prompt)) > read:
        warnings.append(f"The prompt has {num_tokens} tokens, but the model reads the first {read}.")
    return warnings
