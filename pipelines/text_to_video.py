"""From a plan to frames: encode the prompt, denoise, decode."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vgen import files, options
from vgen.backbones import Shot
from vgen.conditioning.frames import GivenImages, ImageCondition, fit_image, open_image
from vgen.errors import VgenError
from vgen.request import GenerateRequest, Plan
from vgen.runtime import noise_generator, synchronize
from vgen.sampling import SAMPLERS, bind
from vgen.sampling.flow import OnStep
from vgen.sampling.guidance import classifier_free

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vgen.backbones import Backbone
    from vgen.video import Sound

# Called when a stage begins, with its name: "encode", "denoise" or "decode".
OnStage = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished video, its latents, the seconds that each stage took, and the sound of a model that makes one.

    frames uint8 [F, H, W, 3]; latents float32 [1, C, T, h, w] on the CPU.
    """

    frames: np.ndarray
    latents: Tensor
    timings: dict[str, float]
    sound: Sound | None = None


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
            shot = _shot(plan)
            images = _given_images(plan, on_warning)
            (text,) = backbone.encode_prompt([plan.prompt], images)
            (negative,) = backbone.encode_prompt([plan.negative_prompt]) if plan.cfg_scale > 1 else (None,)
            image = ImageCondition() if images is None else backbone.encode_images(images, shot)

        with stages("denoise"):
            noise = backbone.noise(shot)
            known = image.known
            velocity = functools.partial(
                backbone.velocity,
                known=None if known is None else known.mask,
                shot=shot,
                image=image.inputs,
                guidance_scale=plan.embedded_guidance_scale,
            )
            flow = classifier_free(velocity, text, negative, _guidance_scale(plan, backbone))
            sigmas = backbone.sigmas(plan.num_inference_steps, shot)
            solve = bind(sampler, lambda: backbone.native_scheduler(plan.num_inference_steps, shot))
            start = image.start(noise)
            latents = solve(flow if known is None else known.held(flow), start, sigmas, on_step=on_step)
            latents = latents if known is None else known.hold(latents)

        if not bool(latents.isfinite().all()):
            raise VgenError(
                "The model produced values that are not finite, which would decode to noise.",
                tip="try --dtype float32, another --seed or a lower --guidance-scale.",
            )
        if save_latents is not None:
            save_latents(latents.cpu())
        with stages("decode"):
            frames = backbone.decode(latents, shot)[0].cpu().numpy()
            sound = backbone.decode_sound(latents, shot)
    return Generation(frames=frames, latents=latents.cpu(), timings=stages.timings, sound=sound)


def decode_latents(path: Path, backbone: Backbone, *, on_stage: OnStage | None = None) -> Generation:
    """Return the video of a latents file that `save_latents` wrote; `timings` has "decode" only."""
    import torch

    latents, request = load_latents(path)
    defaults = backbone.checkpoint.defaults
    shot = Shot(
        num_frames=request.num_frames or defaults.num_frames,
        height=request.height or defaults.height,
        width=request.width or defaults.width,
        fps=request.fps or defaults.fps,
        generator=noise_generator(request.seed or 0),
    )
    stages = _Stages(backbone, on_stage)
    with torch.inference_mode(), stages("decode"):
        on_device = latents.to(backbone.runtime.device)
        frames = backbone.decode(on_device, shot)[0].cpu().numpy()
        sound = backbone.decode_sound(on_device, shot)
    return Generation(frames=frames, latents=latents, timings=stages.timings, sound=sound)


def rebuild(plan: Plan, frames: np.ndarray, backbone: Backbone, *, on_stage: OnStage | None = None) -> Generation:
    """Return what the VAE leaves of frames uint8 [F, H, W, 3]: the best that a model could make of a plan."""
    import torch

    stages = _Stages(backbone, on_stage)
    with torch.inference_mode():
        with stages("encode"):
            latents = backbone.encode_frames(torch.tensor(frames)[None])
        with stages("decode"):
            rebuilt = backbone.decode(latents, _shot(plan))[0].cpu().numpy()
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


def _shot(plan: Plan) -> Shot:
    return Shot(
        num_frames=plan.num_frames,
        height=plan.height,
        width=plan.width,
        fps=plan.fps,
        generator=noise_generator(plan.seed),
    )


def _given_images(plan: Plan, on_warning: Callable[[str], None]) -> GivenImages | None:
    import torch

    def frame(path: Path) -> Tensor:
        image = open_image(path)
        if image.width * plan.height != image.height * plan.width:
            on_warning(
                f"The image is {image.width}x{image.height} and the video {plan.width}x{plan.height}: "
                "the image's edges are cut off."
            )
        return torch.tensor(fit_image(image, plan.width, plan.height))[None, None]

    if plan.image is None:
        return None
    return GivenImages(first=frame(plan.image), last=None if plan.last_image is None else frame(plan.last_image))


def _guidance_scale(plan: Plan, backbone: Backbone) -> float | Callable[[Tensor], float]:
    second = plan.guidance_scale_2
    if second is None:
        return plan.cfg_scale
    return lambda sigma: second if backbone.is_below_boundary(sigma) else plan.cfg_scale


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
