"""Trains Toyland's text encoder and DiT together: rectified flow with any subset of the latent frames known."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from vgen.compiling import OPTIONS
from vgen.toyland import captions, text
from vgen.training.codec import load_codec
from vgen.training.latents import LatentSet, latent_set, latent_statistics, require_made_by
from vgen.training.loop import Budget, Progress, train
from vgen.training.muon import Muon
from vgen.training.vae import LATENT_CHANNELS

CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": text.TEXT_WIDTH,
    "freq_dim": 256,
    "ffn_dim": 1024,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
# Of the normal variable whose sigmoid is sigma: much noise, because only there does the prompt decide what is not
# seen yet. More tokens show the same through more noise: the mean is for IMAGE_TOKENS tokens and grows with them.
TIME_MEAN, TIME_SPREAD, IMAGE_TOKENS = 0.8, 1.4, 64
DROPPED_CAPTIONS = 0.1
KNOWN_SHARE = 0.3  # of the batches have known tokens
KNOWN_FRAMES_SHARE = 0.7  # of these are whole frames; the others are regions
SUBJECT_WEIGHT = 6.0  # of the loss where a subject is, above the background's 1, as the noise goes to 0
STATISTICS = "latents.json"  # the latents' means and divisors, in a run's folder
HISTORY = "history"  # the weights of every save, in a run's folder
# Of inductor, on CPUs. Its matcher would make the fused kernel again of attention that is products.
COMPILED = {**OPTIONS, "pattern_matcher": False}
RECOMPILE_LIMIT = 64  # of dynamo: several shapes, with known tokens and without, by each of the paddings
PADDINGS = (48,) * 9 + (64, 512)  # lengths that prompts are padded to; stock pipelines use 512


class TextToVelocity(nn.Module):
    """The text encoder and the DiT as one module for the training loop."""

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor, padding: int) -> Tensor:
        """Return the velocity, shaped as `latents` [B, C, T, h, w].

        `timesteps` [B], or [B, L] for each video token, are in [0, 1000]; `tokens` [B, S] are padded with 0 and their
        embeddings with zeros up to `padding`.
        """
        mask = tokens != 0
        prompt = self.text_encoder(tokens, attention_mask=mask).last_hidden_state * mask[..., None]
        prompt = nn.functional.pad(prompt, (0, 0, 0, padding - prompt.shape[1]))
        velocity: Tensor = self.transformer(latents, timesteps, prompt, return_dict=False)[0]
        return velocity


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one step learns from."""

    latents: Tensor  # [B, C, T, h, w], normalised
    coverage: Tensor  # [B, T, h, w]: the share that subjects cover
    known: Tensor  # bool [B, T, h/2, w/2]: tokens that are given, clean
    noise: Tensor  # like latents
    sigma: Tensor  # [B]
    tokens: Tensor  # long [B, S]
    padding: int

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**{**vars(self), **tensors})


def known_frames(rng: random.Random, length: int) -> list[bool]:
    """Return which of `length` latent frames are given: a start, both ends, an end or any subset."""
    kind = rng.random()
    if kind < 0.4:
        given = {0}
    elif kind < 0.6:
        given = set(range(rng.randrange(1, length)))
    elif kind < 0.75:
        given = {0, length - 1}
    elif kind < 0.85:
        given = {length - 1}
    else:
        given = set(rng.sample(range(length), rng.randrange(1, length)))
    return [index in given for index in range(length)]


def known_tokens(rng: random.Random, grid: tuple[int, int, int]) -> Tensor:
    """Return which tokens of a grid (T, h, w) are given, bool: whole frames, or all but a box, or a box alone."""
    length, rows, columns = grid
    if rng.random() < KNOWN_FRAMES_SHARE:
        return torch.tensor(known_frames(rng, length))[:, None, None].expand(grid)
    (top, bottom), (left, right) = (sorted(rng.sample(range(size + 1), 2)) for size in (rows, columns))
    box = torch.zeros(grid, dtype=torch.bool)
    box[:, top:bottom, left:right] = True
    return box if rng.random() < 0.25 and not box.all() else ~box


def batch_maker(
    sets: list[LatentSet],
    tokenizer: PreTrainedTokenizerFast,
    *,
    mean: Tensor,
    std: Tensor,
    seed: int,
    time_mean: float = TIME_MEAN,
    time_spread: float = TIME_SPREAD,
) -> Callable[[int, int], Batch]:
    """Return a function (step, size) → Batch: which clips, captions, times and noise depend on seed and step alone.

    `size` counts clips of the first set; a batch of another has about as many tokens. Sets are drawn by their tokens.
    `time_mean` and `time_spread` are of the normal variable whose sigmoid is sigma, for IMAGE_TOKENS tokens.
    """
    sizes = [one.latents[0, 0].numel() for one in sets]

    def make(step: int, size: int) -> Batch:
        rng = random.Random(f"{seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        index = rng.choices(range(len(sets)), weights=[one.latents[:, 0].numel() for one in sets])[0]
        chosen, size = sets[index], max(1, round(size * sizes[0] / sizes[index]))
        picks = [rng.randrange(len(chosen.clips)) for _ in range(size)]
        latents = (chosen.latents[picks].float() - mean) / std
        texts = [
            "" if rng.random() < DROPPED_CAPTIONS
            else captions.caption(chosen.clips[pick], rng, rng.choice(captions.LENGTHS))
            for pick in picks
        ]  # fmt: skip
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt").input_ids
        # All or none in a batch, because per-token timesteps cost a tenth of a step.
        some_known = latents.shape[2] > 1 and rng.random() < KNOWN_SHARE
        grid = (latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2)
        known = torch.stack([known_tokens(rng, grid) if some_known else torch.zeros(grid).bool() for _ in picks])
        num_tokens = math.prod(grid)
        shift = 0.5 * math.log(num_tokens / IMAGE_TOKENS)
        sigma = torch.sigmoid(time_mean + shift + time_spread * torch.randn(size, generator=generator))
        noise = torch.randn(latents.shape, generator=generator)
        return Batch(
            latents=latents,
            coverage=chosen.coverage[picks].float(),
            known=known,
            noise=noise,
            sigma=sigma,
            tokens=tokens,
            padding=rng.choice(PADDINGS),
        )

    return make


def flow_matching_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean square error of the velocity `noise - latents` over the tokens that are not known.

    Known tokens stay clean and their time is 0 (Wan 2.2's per-token timesteps). Subjects weigh more than the
    background that surrounds them, but only as far as the noise lets one see where they are: at sigma 1, where a
    weight would bias the mean towards subjects everywhere, all weigh the same.
    """
    sigma = torch.where(batch.known, 0.0, batch.sigma.view(-1, 1, 1, 1))  # [B, T, h/2, w/2]
    timesteps = (sigma * 1000).flatten(1) if batch.known.any() else batch.sigma * 1000
    at = cells_of(sigma)[:, None]
    noisy = (1 - at) * batch.latents + at * batch.noise
    velocity: Tensor = model(noisy, timesteps, batch.tokens, batch.padding)
    error = (velocity.float() - (batch.noise - batch.latents)).square().mean(1)  # [B, T, h, w]
    weight = 1 + SUBJECT_WEIGHT * (1 - batch.sigma**4).view(-1, 1, 1, 1) * batch.coverage
    weight = weight * ~cells_of(batch.known)
    return (error * weight).sum() / weight.sum()


def cells_of(tokens: Tensor) -> Tensor:
    """Return [B, T, h, w] of [B, T, h/2, w/2]: the latent pixels of each token."""
    return tokens.repeat_interleave(2, 2).repeat_interleave(2, 3)


def optimizers_of(model: TextToVelocity, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the transformer blocks' matrices and AdamW for everything else."""
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.transformer.parameters() if id(p) not in chosen]
    groups = [
        {"params": others, "lr": 0.4 * learning_rate},
        {"params": list(model.text_encoder.parameters()), "lr": 0.04 * learning_rate},
    ]
    return [
        Muon(matrices, learning_rate, weight_decay=0.01),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@contextmanager
def attention_by_products() -> Iterator[None]:
    """Let attention be products and a softmax: on CPUs half the time of torch's fused kernel, if short a quarter."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # of CPUs, too: else products are in float32
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def load_run(folder: Path) -> TextToVelocity:
    """Return the averaged model that a run saved in `folder`."""
    return TextToVelocity(
        UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        WanTransformer3DModel.from_pretrained(folder / "transformer"),
    )


def train_base(
    folder: Path,
    *,
    vae: Path,
    shapes: list[tuple[int, int, int, int]],
    budget: Budget,
    batch_size: int,
    text_encoder: Path | None = None,
    start: Path | None = None,
    seed: int = 0,
    learning_rate: float = 2e-3,
    time_mean: float = TIME_MEAN,
    time_spread: float = TIME_SPREAD,
    compile_blocks: bool = True,
    keep: bool = False,
) -> TextToVelocity:
    """Train in `folder` and return the averaged model.

    `shapes` are (frames, height, width, count) of the clips to render, encode with the VAE in `vae` and learn from;
    their latents are kept in `folder`. The run begins with the text encoder in `text_encoder`, or with all the weights
    of another run's folder, `start`. The latents' statistics come from the first run's first shape and stay with the
    run: a VAE serves one normalisation. Times are drawn as `batch_maker` says. `keep` keeps the weights of every save
    in `history`, by their step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision="bf16")
    torch.manual_seed(seed)
    codec = load_codec(vae, accelerator.device)
    with accelerator.main_process_first():  # the others find what it has encoded
        require_made_by(vae, folder)
        sets = [
            latent_set(folder, codec, count=count, num_frames=frames, height=height, width=width)
            for frames, height, width, count in shapes
        ]
        if not (folder / STATISTICS).exists():
            own = json.dumps(latent_statistics(sets[0].latents), indent=1)
            (folder / STATISTICS).write_text((start / STATISTICS).read_text() if start else own)
    facts = json.loads((folder / STATISTICS).read_text())
    if start:
        model = load_run(start)
    else:
        assert text_encoder is not None, "a run begins with a text encoder or another run"
        model = TextToVelocity(UMT5EncoderModel.from_pretrained(text_encoder), WanTransformer3DModel(**CONFIG))
    model.train().requires_grad_(True)
    make = batch_maker(
        sets,
        text.tokenizer(),
        mean=torch.tensor(facts["latents_mean"]).view(1, -1, 1, 1, 1),
        std=torch.tensor(facts["latents_std"]).view(1, -1, 1, 1, 1),
        seed=seed * accelerator.num_processes + accelerator.process_index,
        time_mean=time_mean,
        time_spread=time_spread,
    )

    def loss_of(wrapped: nn.Module, step: int) -> dict[str, Tensor]:
        batch = make(step, batch_size).to(accelerator.device)
        with accelerator.autocast():
            return {"loss": flow_matching_loss(wrapped, batch)}

    def on_save(average: nn.Module, progress: Progress) -> None:
        assert isinstance(average, TextToVelocity)
        for place in [folder] + [folder / HISTORY / f"{progress.step:06d}"] * keep:
            average.transformer.save_pretrained(place / "transformer")
            average.text_encoder.save_pretrained(place / "text_encoder")

    optimizers = optimizers_of(model, learning_rate)
    on_cpu = accelerator.device.type == "cpu"
    if compile_blocks:
        model.transformer.compile_repeated_blocks(options=COMPILED if on_cpu else OPTIONS)
    with attention_by_products() if on_cpu else nullcontext(), dynamo.patch(recompile_limit=RECOMPILE_LIMIT):
        trained = train(
            model, optimizers, loss_of, folder=folder, budget=budget, accelerator=accelerator, on_save=on_save
        )
    assert isinstance(trained, TextToVelocity)
    return trained
