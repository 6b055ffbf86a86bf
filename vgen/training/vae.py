"""Trains Toyland's VAE, an `AutoencoderKLWan`, on crops of rendered clips."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanResidualBlock
from torch import Tensor, nn

from vgen.backbones.components import pixels_of
from vgen.toyland.renderer import render
from vgen.toyland.scene import sample_clips
from vgen.training.loop import Budget, Progress, log, train
from vgen.training.muon import Muon

LATENT_CHANNELS = 24
CONFIG = {
    "base_dim": 24,
    "decoder_base_dim": 24,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
}
POOL_CLIPS, POOL_FRAMES = 200, 33  # rendered once and cropped many times; a few are replaced at every step
REFRESH_STEPS = 2  # steps between two fresh clips
# (share of the batch, frames, side) of the crops, in turn. The decoder carries its state from one latent frame to the
# next: trained on short crops alone, colours drift and contrast grows from the third latent frame on.
CROPS = ((1, 5, 64), (2, 9, 64), (4, 17, 64), (4, 33, 48))
KL_WEIGHT = 1e-3
HELD_OUT_SEED = 1_000_003  # clips that no training sees


class Crops:
    """A pool of rendered clips that hands out random crops, each a function of the seed and the step.

    Clip k of the seed's endless row lies in slot k modulo the pool's size; the window moves on by one clip every
    REFRESH_STEPS steps, wherever a run begins or goes on.
    """

    def __init__(self, seed: int, pool_clips: int) -> None:
        self.seed, self.pool_clips = seed, pool_clips
        self.clips = sample_clips(seed)
        self.pool = torch.empty(0)
        self.rendered = 0

    def move_to(self, step: int) -> None:
        """Render what the pool lacks at `step`."""
        end = step // REFRESH_STEPS + self.pool_clips
        if not len(self.pool):
            self.rendered = end - self.pool_clips
            self.clips = islice(self.clips, self.rendered, None)
            self.pool = torch.empty(self.pool_clips, POOL_FRAMES, 128, 128, 3, dtype=torch.uint8)
        for index in range(self.rendered, end):
            self.pool[index % self.pool_clips] = render([next(self.clips)], num_frames=POOL_FRAMES).frames[0]
        self.rendered = end

    def batch(self, step: int, size: int, num_frames: int, side: int) -> Tensor:
        """Return crops [size, 3, num_frames, side, side] in [-1, 1]."""
        self.move_to(step)
        rng = random.Random(f"{self.seed}/{step}")
        crops = []
        for _ in range(size):
            first = rng.randrange(POOL_FRAMES - num_frames + 1)
            y, x = (rng.randrange(length - side + 1) for length in self.pool.shape[2:4])
            clip = self.pool[rng.randrange(self.pool_clips)]
            crops.append(clip[first : first + num_frames, y : y + side, x : x + side])
        return pixels_of(torch.stack(crops))


class Rebuild(nn.Module):
    """A VAE's whole way, frames → latents → frames, as one module for the training loop."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the rebuilt video, shaped as `video`, and the posterior's mean KL divergence per latent number."""
        posterior = self.vae.encode(video).latent_dist
        latents = posterior.sample(generator)
        return self.vae.decode(latents).sample, posterior.kl().sum() / latents.numel()


def untrained_vae() -> AutoencoderKLWan:
    """Return a VAE whose residual blocks begin as identities, so that it learns the linear way through first."""
    vae = AutoencoderKLWan(**CONFIG)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
    return vae


def train_vae(
    folder: Path,
    *,
    budget: Budget,
    seed: int = 0,
    batch_size: int = 4,
    learning_rate: float = 1e-2,
    start: Path | None = None,
    freeze_encoder: bool = False,
    pool_clips: int = POOL_CLIPS,
) -> AutoencoderKLWan:
    """Train a VAE in `folder` and return it; PSNR of held-out clips is in the log.

    `start` is a VAE's folder to begin from. With `freeze_encoder` its latents stay what they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision="bf16")
    torch.manual_seed(seed)
    vae = AutoencoderKLWan.from_pretrained(start) if start else untrained_vae()
    if freeze_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    kernels = [p for p in parameters if p.ndim >= 4 and p.shape[0] > 1]
    chosen = {id(p) for p in kernels}
    others = [p for p in parameters if id(p) not in chosen]
    optimizers = [Muon(kernels, learning_rate), torch.optim.AdamW(others, 1e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    crops = Crops(seed + accelerator.process_index, pool_clips)

    def loss_of(model: nn.Module, step: int) -> dict[str, Tensor]:
        share, num_frames, side = CROPS[step % len(CROPS)]
        video = crops.batch(step, max(1, batch_size // share), num_frames, side).to(accelerator.device)
        noise = torch.Generator().manual_seed(2 * step * accelerator.num_processes + accelerator.process_index)
        with accelerator.autocast():
            rebuilt, kl = model(video, noise)
        error = rebuilt.float() - video
        absolute, square = error.abs().mean(), error.square().mean()
        return {"loss": absolute + 4 * square + KL_WEIGHT * kl, "mse": square, "kl": kl}

    def on_save(average: nn.Module, progress: Progress) -> None:
        assert isinstance(average, Rebuild)
        log(folder, {"step": progress.step, "psnr": held_out_psnr(average.vae, 8)})
        average.vae.save_pretrained(folder / "vae")

    model = train(
        Rebuild(vae),
        optimizers,
        loss_of,
        folder=folder,
        budget=budget,
        accelerator=accelerator,
        ema_decay=0.998,
        on_save=on_save,
    )
    assert isinstance(model, Rebuild)
    return model.vae


@torch.inference_mode()
def held_out_psnr(vae: AutoencoderKLWan, num_clips: int) -> float:
    """Return the PSNR in dB of whole held-out clips through the VAE, from the mean square error over all of them."""
    error, device = 0.0, vae.device
    for clip in islice(sample_clips(HELD_OUT_SEED), num_clips):
        video = pixels_of(render([clip]).frames.to(device))
        with torch.autocast(device.type, torch.bfloat16):
            rebuilt = vae.decode(vae.encode(video).latent_dist.mode()).sample.float().clamp(-1, 1)
        error += float((rebuilt - video).square().mean())
    return float(10 * torch.log10(torch.tensor(4 * num_clips / error)))
