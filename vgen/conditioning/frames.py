"""Given images and known frames: parts of the video that are there before the rest is generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vgen.sampling.flow import Velocity

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GivenImages:
    """What a video begins with, and maybe ends with: frames uint8 [1, 1, H, W, 3] of the video's size."""

    first: Tensor
    last: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ImageCondition:
    """How given images reach a model: by latents that are held, by inputs of its own, by the noise; or several.

    `inputs` goes to the backbone's `velocity`, which alone looks inside; `start` makes of the noise [1, C, T, h, w]
    what the sampler starts from.
    """

    known: KnownFrames | None = None
    inputs: Any = None
    start: Callable[[Tensor], Tensor] = lambda noise: noise


@dataclass(frozen=True, kw_only=True)
class KnownFrames:
    """Latents [1, C, T, h, w] that are given where `mask` [1, 1, T, h, w] is true; the others mean nothing.

    A mask that is the same all over a frame may have h = w = 1. Of the cells of a token all are known or none, as a
    model takes a timestep per token.
    """

    latents: Tensor
    mask: Tensor

    def hold(self, latents: Tensor) -> Tensor:
        """Return latents [B, C, T, H, W] with the known ones put in place."""
        return self.latents.where(self.mask, latents)

    def held(self, velocity: Velocity) -> Velocity:
        """Return a velocity that sees the known latents in place, whatever the sampler has made of them."""
        return lambda latents, sigma: velocity(self.hold(latents), sigma)

    def reinjected(self, velocity: Velocity, noise: Tensor) -> Velocity:
        """Return a velocity that sees the known latents with `noise` as strong as everywhere else.

        For a model without per-token timesteps, which takes all that it sees to be at one sigma (RePaint's known
        region, Lugmayr et al. 2022, arXiv:2201.09865, on a flow and without its resampling).
        """

        def at_sigma(latents: Tensor, sigma: Tensor) -> Tensor:
            known = (1 - sigma) * self.latents + sigma * noise
            return velocity(known.where(self.mask, latents), sigma)

        return at_sigma

    def padded(self, num_latent_frames: int) -> KnownFrames:
        """Return the same for `num_latent_frames`: what a model packs behind its frames is not known."""
        missing = num_latent_frames - self.latents.shape[2]
        if missing == 0:
            return self
        from torch.nn.functional import pad

        behind = (0, 0, 0, 0, 0, missing)
        return KnownFrames(latents=pad(self.latents, behind), mask=pad(self.mask, behind))


def first_frame(frame_latents: Tensor, num_latent_frames: int) -> KnownFrames:
    """Return known frames out of the latents [1, C, 1, H, W] of a first frame, for `num_latent_frames` in all."""
    mask = frame_latents.new_zeros((1, 1, num_latent_frames, 1, 1)).bool()
    mask[:, :, 0] = True
    return KnownFrames(latents=frame_latents.expand(-1, -1, num_latent_frames, -1, -1), mask=mask)
