"""What a checkpoint is: where it lies, what it takes when nothing is said, which sizes it allows, what it can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vgen.integrity import CheckpointFile
from vgen.loras import Lora

Source = Literal["embedded", "folder", "hub"]


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a checkpoint takes when the user says nothing; sizes in pixels, `fps` in frames per second.

    `guidance_scale_2` is that of a second transformer, where it differs. `shift` is the recommended shift of the
    flow's schedule; None: as the checkpoint's own scheduler says. `timesteps`, of 1000, are the noise levels that a
    few-step student was trained at, before the shift; empty for other models. `attention` is the sparse attention
    that it was trained with and cannot do without; empty for the dense one.
    """

    width: int
    height: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    negative_prompt: str
    max_sequence_length: int
    guidance_scale_2: float | None = None
    shift: float | None = None
    timesteps: tuple[int, ...] = ()
    attention: str = ""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which sizes and lengths a checkpoint takes.

    Sizes are multiples of `size_multiple` up to `max_size` pixels, or with `fixed_size` one of the checkpoint's
    `sizes` and no other; frame counts are `frame_multiple` * k + 1 up to `max_frames`.
    """

    size_multiple: int
    frame_multiple: int
    max_size: int
    max_frames: int
    fixed_size: bool = False


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a checkpoint can do, and what can be done with it.

    `image_to_video` is from a first frame, in whatever way the family has, and `last_image` is to a last one, too;
    `known_frames` is from any frames, which needs a timestep per token; `identity` is from a face. With
    `embedded_guidance` the guidance scale is an input of the model and costs no second pass. `two_transformers` share
    the noise levels and may have a guidance scale each. `context_parallel` is over several GPUs, `attention` by other
    methods than the dense one.
    """

    text_to_video: bool = False
    image_to_video: bool = False
    last_image: bool = False
    known_frames: bool = False
    identity: bool = False
    audio: bool = False
    embedded_guidance: bool = False
    two_transformers: bool = False
    lora: bool = False
    cache: bool = False
    context_parallel: bool = False
    attention: bool = False

    @property
    def needs_image(self) -> bool:
        """Whether it only continues an image."""
        return self.image_to_video and not self.text_to_video


@dataclass(frozen=True, kw_only=True)
class Component:
    """A part of a checkpoint that has weights, such as "transformer", and how many parameters it has."""

    name: str
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Peak:
    """GPU memory in 10^9 bytes that a run was reported to take: all on the GPU, or with components offloaded."""

    whole: float | None = None
    offload: float | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found: its family, its folder in diffusers layout (None: not downloaded), and its rules.

    `knows` is one sentence on what a small model can show; it is empty for a model without such a limit. `permits` is
    one on the licence. `peak` and `download_gb` (in 10^9 bytes) are known for names of the catalogue, `components` for
    these and for weights that are on this machine. Of one on the hub, `revision` is the commit where it is known, and
    `follows` the branch, tag or commit that was asked for (None: the newest). `quantization` is the scheme of one that
    vgen has quantized. Of one that is `streamed` the weights that can be quantized are read from their files each time
    that they are used, rather than once.
    """

    name: str
    family: str
    source: Source
    folder: Path | None
    repo: str | None
    revision: str | None
    licence: str
    files: tuple[CheckpointFile, ...]
    defaults: Defaults
    knows: str
    rules: Rules
    can: Capabilities = Capabilities()
    permits: str = ""
    download_gb: float | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    components: tuple[Component, ...] = ()
    peak: Peak = Peak()
    loras: tuple[Lora, ...] = ()
    follows: str | None = None
    quantization: str = ""
    streamed: bool = False

    @property
    def anchored_name(self) -> str:
        """The name with the commit that it stands for, where that is known: it means the same on any day."""
        name = self.name.partition("@")[0]
        return f"{name}@{self.revision}" if self.source == "hub" and self.revision else name

    @property
    def lasting_name(self) -> str:
        """The name or folder that means this checkpoint from any folder on any day."""
        return str(self.folder) if self.source == "folder" else self.anchored_name

    def weights_gb(self, *, offload: bool = False, dtype: str = "bfloat16") -> float | None:
        """Return what the weights take in memory, in 10^9 bytes: the VAE in float32, the rest in `dtype`.

        With `offload` one component is there at a time, so that the largest counts. None where they are not known.
        """
        width = 4 if dtype == "float32" else 2
        sizes = [part.parameters * (4 if part.name == "vae" else width) / 1e9 for part in self.components]
        return (max(sizes) if offload else sum(sizes)) if sizes else None


def defaults(values: Mapping[str, Any]) -> Defaults:
    """Return the defaults of values as YAML and JSON have them, with a list in the place of a tuple."""
    return Defaults(**{**values, "timesteps": tuple(values.get("timesteps", ()))})
