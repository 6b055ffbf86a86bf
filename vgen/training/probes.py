"""Trains the probes on renders, sharp ones and ones that went through the VAE, and on what cannot be read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vgen.backbones.components import pixels_of
from vgen.toyland import probes
from vgen.toyland.probes import NEEDS, NUM_FRAMES, SIDE, VERDICTS, ProbeNetwork, face_similarity
from vgen.toyland.prompts import ATTRIBUTES
from vgen.toyland.scene import Clip
from vgen.training.loop import Budget, Progress, log, train
from vgen.training.muon import Muon
from vgen.training.passed import (
    TRAINING_SEED,
    VALIDATION_SEED,
    Examples,
    head_pairs,
    joined,
    passed_set,
    probe_clips,
    rendered_examples,
    turn_clips,
)

POOL_CLIPS = 384  # sharp renders in memory
FRESH_CLIPS = 2  # of them replaced at every step
VALIDATION_CLIPS = 128
ATTENTION_WEIGHT, PATH_WEIGHT, LOOK_WEIGHT, VERDICT_WEIGHT = 0.5, 0.5, 0.5, 0.5
UNREADABLE_SHARE = 0.12  # of a batch: not a picture; as many again have their frames in disorder
SOFTENED_SHARE = 0.3  # of the sharp clips: made smaller and large again, as a stand-in for other codecs
FRAYED_SHARE = 0.3  # of all clips: outlines and colours that waver, as those of generated videos do
# The points of this wavering along a side, and how far (a deviation, in pixels) and how strong it is at the most.
FRAY_GRID, FRAY_PIXELS, FRAY_STAINS = 17, 2.0, 0.05
CUT_SHARE = 0.05  # ends before two seconds
TURN_EVERY = 3  # of the sharp clips, one of those whose spin shows least

REVERSED = {
    "moves left": "moves right", "comes closer": "goes away", "rises": "falls", "dolly in": "dolly out",
    "tilt up": "tilt down", "pan left": "pan right", "truck left": "truck right", "orbit left": "orbit right",
}  # fmt: skip
REVERSED |= {after: before for before, after in REVERSED.items()}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the network sees, [N, 3, NUM_FRAMES, SIDE, SIDE] in [-1, 1], and what it should say."""

    video: Tensor
    labels: Tensor
    """int64 [N, ATTRIBUTES]."""
    verdicts: Tensor
    """float32 [N, VERDICTS]."""
    coverage: Tensor
    """float32 [N, LOOK_FRAMES, cells]."""
    path: Tensor
    """float32 [N, NUM_FRAMES, PATH_SIZE]."""
    looks: Tensor
    """float32 [N, LOOK_SIZE], NaN where there is no face."""

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


class Renders:
    """A pool of sharp clips that moves on by FRESH_CLIPS at every step, wherever a run begins or goes on."""

    def __init__(self, seed: int, pool_clips: int) -> None:
        turns = turn_clips(seed)
        self.clips: Iterator[Clip] = (
            next(turns) if index % TURN_EVERY == 0 else clip for index, clip in enumerate(probe_clips(seed))
        )
        self.pool_clips = pool_clips
        self.pool: Examples | None = None
        self.rendered = 0

    def at(self, step: int) -> Examples:
        """Return the pool at `step`."""
        end = step * FRESH_CLIPS + self.pool_clips
        if self.pool is None:
            self.rendered = end - self.pool_clips
            self.clips = islice(self.clips, self.rendered, None)
        fresh = list(islice(self.clips, end - self.rendered))
        made = [rendered_examples(fresh[start : start + 8]) for start in range(0, len(fresh), 8)]
        kept = [] if self.pool is None else [self.pool[len(fresh) :]]
        self.pool, self.rendered = joined([*kept, *made]) if made else self.pool, end
        assert self.pool is not None
        return self.pool


def batch_of(examples: Examples, rng: random.Random, softened_share: float = 0.0) -> Batch:
    """Return examples as a batch: mirrored, reversed, tinted, softened and frayed, each at random."""
    video = pixels_of(examples.frames).contiguous()
    labels, path, coverage = examples.labels.clone(), examples.path.clone(), examples.coverage.float() / 255
    for index in range(len(video)):
        values = [names[labels[index, at]] for at, names in enumerate(ATTRIBUTES.values())]
        backwards = rng.random() < 0.5
        # A roll is clockwise: backwards it is so in the mirror.
        mirrored = backwards if "roll" in values else rng.random() < 0.5
        if backwards:
            video[index], path[index] = video[index].flip(1), path[index].flip(0)
            coverage[index] = coverage[index].flip(0)
            values = [REVERSED.get(value, value) for value in values]
        if mirrored:
            video[index], path[index] = video[index].flip(3), path[index] * MIRROR
            coverage[index] = coverage[index].flip(2)
            values = [mirror(value) for value in values]
        labels[index] = torch.tensor([names.index(values[at]) for at, names in enumerate(ATTRIBUTES.values())])
        if rng.random() < softened_share:
            video[index] = soften(video[index], rng.uniform(0.35, 0.8))
        if rng.random() < FRAYED_SHARE:
            video[index] = fray(video[index], rng)
        if rng.random() < CUT_SHARE:
            last = rng.randrange(NUM_FRAMES // 2, NUM_FRAMES)
            video[index, :, last:] = video[index, :, last : last + 1].clone()
    noise = torch.Generator().manual_seed(rng.getrandbits(60))
    light = 1 + 0.06 * torch.randn(len(video), 3, 1, 1, 1, generator=noise)
    shade = 0.03 * torch.randn(len(video), 3, 1, 1, 1, generator=noise)
    grain = 0.03 * torch.randn(len(video), 1, 1, 1, 1, generator=noise)
    grains = torch.randn(video.shape[1:], generator=noise)  # the same for all, but for their strength: it is slow
    video = video.mul_(light).add_(shade).addcmul_(grain, grains)
    verdicts = torch.ones(len(video), len(VERDICTS))
    verdicts[:, VERDICTS.index("subject")] = examples.single.float()
    return Batch(
        video=video.clamp_(-1, 1),
        labels=labels,
        verdicts=verdicts,
        coverage=coverage.flatten(2),
        path=path,
        looks=examples.looks.clone(),
    )


def mirror(value: str) -> str:
    """Return the value that the mirror shows."""
    swapped = {"left": "right", "right": "left"}
    return " ".join(swapped.get(word, word) for word in value.split())


def mirror_signs() -> Tensor:
    """Return what the mirror multiplies a path [PATH_SIZE] by: x of the track, turns between x and the rest."""
    track = [-1.0, 1.0, 1.0]
    pose = [-1.0 if (row == 0) != (column == 0) else 1.0 for row in range(3) for column in range(4)]
    return torch.tensor(track + pose)


MIRROR = mirror_signs()


def soften(video: Tensor, scale: float) -> Tensor:
    """Return a video [3, F, H, W] without what is finer than 1 / scale pixels."""
    frames = video.transpose(0, 1)
    small = nn.functional.interpolate(frames, scale_factor=scale, mode="bilinear", antialias=True)
    return nn.functional.interpolate(small, frames.shape[2:], mode="bilinear").transpose(0, 1)


def fray(video: Tensor, rng: random.Random) -> Tensor:
    """Return a video [3, F, H, W] whose outlines waver by up to FRAY_PIXELS or so, and stained, new in every frame."""
    frames = video.transpose(0, 1)
    noise = torch.Generator().manual_seed(rng.getrandbits(60))
    coarse = torch.randn(len(frames), 5, FRAY_GRID, FRAY_GRID, generator=noise)
    strength = torch.tensor([FRAY_PIXELS * 2 / SIDE] * 2 + [FRAY_STAINS] * 3) * rng.random()
    waver = nn.functional.interpolate(coarse * strength.view(1, 5, 1, 1), frames.shape[2:], mode="bicubic")
    straight = torch.eye(2, 3).expand(len(frames), 2, 3)
    grid = nn.functional.affine_grid(straight, list(frames.shape), align_corners=False)
    wavering = grid + waver[:, :2].permute(0, 2, 3, 1)
    moved = nn.functional.grid_sample(frames, wavering, padding_mode="border", align_corners=False)
    return (moved + waver[:, 2:]).transpose(0, 1)


def spoil(batch: Batch, rng: random.Random) -> Batch:
    """Return the batch with some of its videos made unreadable, in place, and the verdicts that say so."""
    video, verdicts = batch.video, batch.verdicts.clone()
    # Nothing moves, or turns alone: a pyramid shows the same again after a quarter of a turn.
    static = ATTRIBUTES["camera"].index("static")
    orderless = [[ATTRIBUTES["action"].index(name), static] for name in ("stays", "spins")]
    at = [list(ATTRIBUTES).index("action"), list(ATTRIBUTES).index("camera")]
    for index in range(len(video)):
        chance = rng.random()
        if chance < UNREADABLE_SHARE:
            video[index] = no_picture(video[index], rng)
            verdicts[index] = 0
        elif chance < 2 * UNREADABLE_SHARE and batch.labels[index, at].tolist() not in orderless:
            video[index] = video[index][:, disorder(rng)]
            verdicts[index, VERDICTS.index("order")] = 0
    return replace(batch, video=video, verdicts=verdicts)


def disorder(rng: random.Random) -> list[int]:
    """Return frame numbers in an order that is neither forwards nor backwards, nor nearly so."""
    while True:
        order = rng.sample(range(NUM_FRAMES), NUM_FRAMES)
        steps = [after - before for before, after in pairwise(order)]
        if max(sum(step > 0 for step in steps), sum(step < 0 for step in steps)) < NUM_FRAMES - 2:
            return order


def no_picture(video: Tensor, rng: random.Random) -> Tensor:
    """Return noise, a flat colour, or pieces of a video [3, F, H, W] in the wrong places."""
    noise = torch.Generator().manual_seed(rng.getrandbits(60))
    match rng.randrange(4):
        case 0:  # one colour, or one for each frame; often black
            frames = rng.choice((1, video.shape[1]))
            flat = torch.rand(3, frames, 1, 1, generator=noise) * rng.choice((0.0, 0.02, 2.0)) - 1
            return flat.expand_as(video)
        case 1:  # noise of any grain, the same in all frames or not
            grain, frames = rng.choice((1, 2, 4, 8, 16, 32)), rng.choice((1, video.shape[1]))
            shape = (3, frames, video.shape[2] // grain, video.shape[3] // grain)
            draw = rng.choice((torch.rand, torch.randn))
            coarse = draw(shape, generator=noise)
            coarse = coarse * 2 - 1 if draw is torch.rand else coarse
            fine = coarse.repeat_interleave(grain, 2).repeat_interleave(grain, 3)
            return (fine * rng.uniform(0.1, 1)).clamp(-1, 1).expand_as(video)
        case 2:  # pieces of the pictures, exchanged
            piece = rng.choice((8, 16, 32, 64))
            cells = SIDE // piece
            moved = torch.randperm(cells * cells, generator=noise)
            split = video.reshape(*video.shape[:2], cells, piece, cells, piece).permute(2, 4, 0, 1, 3, 5)
            mixed = split.flatten(0, 1)[moved].view_as(split).permute(2, 3, 0, 4, 1, 5)
            return mixed.reshape(video.shape)
        case _:  # drowned in noise
            return (0.12 * video + 0.6 * torch.randn(video.shape, generator=noise)).clamp(-1, 1)


def loss_terms(outputs: dict[str, Tensor], batch: Batch, mean: Tensor, deviation: Tensor) -> dict[str, Tensor]:
    """Return "loss" and its parts. Nothing is asked of a reading whose verdict is no.

    Beside the readings the network learns where the subject is (attention) and the paths of subject and camera, which
    the renderer knows exactly: these tell in every clip what a label tells in few words.
    """
    possible = batch.verdicts > 0.5
    terms = {}
    for column, name in enumerate(ATTRIBUTES):
        counts = possible[:, [VERDICTS.index(need) for need in NEEDS[name]]].all(1).float()
        each = nn.functional.cross_entropy(outputs[name], batch.labels[:, column], reduction="none")
        terms[name] = (each * counts).sum() / counts.sum().clamp(min=1)
    verdicts = nn.functional.binary_cross_entropy_with_logits(outputs["verdicts"], batch.verdicts)
    seen = (possible[:, :2].all(1)[:, None] & (batch.coverage.sum(2) > 0.5)).float()  # [N, LOOK_FRAMES]
    where = batch.coverage / batch.coverage.sum(2, keepdim=True).clamp(min=1e-3)
    cross = -(where * outputs["attention"].log_softmax(2)).sum(2)
    attention = (cross * seen).sum() / seen.sum().clamp(min=1)
    whole = possible.all(1).float()
    wrong = nn.functional.smooth_l1_loss(outputs["path"], (batch.path - mean) / deviation, reduction="none")
    path = (wrong.mean((1, 2)) * whole).sum() / whole.sum().clamp(min=1)
    faces = (~batch.looks.isnan().any(1) & possible[:, :2].all(1)).float()
    number, variance = outputs["look"].unbind(1)
    off = (number - batch.looks.nan_to_num()).square()
    # The likelihood of a normal distribution, and the square alone, without which what is unsure learns little.
    unlikely = (off / variance + variance.log() + off).mean(1)
    looks = (unlikely * faces).sum() / faces.sum().clamp(min=1)
    readings = torch.stack(list(terms.values())).sum()
    loss = (
        readings
        + VERDICT_WEIGHT * len(VERDICTS) * verdicts
        + ATTENTION_WEIGHT * attention
        + PATH_WEIGHT * path
        + LOOK_WEIGHT * looks
    )
    return {"loss": loss, **terms, "verdicts": verdicts, "attention": attention, "path": path, "look": looks}


def optimizers_of(network: ProbeNetwork, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for kernels and inner matrices, and AdamW for the rest."""
    inner = [p for name, p in network.named_parameters() if p.ndim >= 2 and not name.startswith(("heads", "look.att"))]
    inner = [p for p in inner if p.shape[0] > 16]
    chosen = {id(p) for p in inner}
    others = [p for p in network.parameters() if id(p) not in chosen]
    return [
        Muon(inner, learning_rate, weight_decay=0.02),
        torch.optim.AdamW(others, 0.2 * learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train_probes(
    folder: Path,
    *,
    vae: Path,
    budget: Budget,
    start: Path | None = None,
    passed_clips: int = 512,
    passed_heads: int = 0,
    passed_turns: int = 0,
    batch_size: int = 32,
    learning_rate: float = 1.5e-2,
    seed: int = 0,
    pool_clips: int = POOL_CLIPS,
    validation_clips: int = VALIDATION_CLIPS,
) -> ProbeNetwork:
    """Train in `folder` and return the averaged network; `folder`/probes holds it for `probes.load`.

    Half of each batch are sharp renders, the other half went through the VAE in `vae`: in equal parts `passed_clips`,
    and where there are such `passed_heads`, toy heads alone, as faces differ in more than all else does, and
    `passed_turns`, solids that spin or stay, which are told apart worst. What went through the VAE is kept in
    `folder`. The run begins with the probes in `start`, where given. Accuracy on clips of another seed is in the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision="bf16")
    with accelerator.main_process_first():  # the others find what it has made
        kinds = {
            "training": list(islice(probe_clips(TRAINING_SEED), passed_clips)),
            "heads": list(islice(head_pairs(TRAINING_SEED), passed_heads)),
            "turns": list(islice(turn_clips(TRAINING_SEED), passed_turns)),
        }
        passed = {name: passed_set(folder, vae, clips, name=name) for name, clips in kinds.items() if clips}
        clips = list(islice(probe_clips(VALIDATION_SEED), validation_clips))
        unseen = passed_set(folder, vae, clips, name="validation")
    torch.manual_seed(seed)
    network = probes.load(start).network.train().requires_grad_(True) if start else ProbeNetwork()
    paths = passed["training"].path[passed["training"].single]
    mean, deviation = paths.mean(0), paths.std(0).clamp(min=0.05)
    own_seed = seed * accelerator.num_processes + accelerator.process_index
    renders = Renders(own_seed, pool_clips)

    def loss_of(wrapped: nn.Module, step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{own_seed}/{step}")
        pool, half = renders.at(step), batch_size // 2
        sharp = batch_of(pool[rng.sample(range(len(pool)), half)], rng, SOFTENED_SHARE)
        count = batch_size - half
        sizes = [count * (at + 1) // len(passed) - count * at // len(passed) for at in range(len(passed))]
        picks = zip(passed.values(), sizes, strict=True)
        blurred = joined([kept[rng.choices(range(len(kept)), k=size)] for kept, size in picks])
        parts = (sharp, batch_of(blurred, rng))
        both = Batch(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(sharp)})
        batch = spoil(both, rng).to(accelerator.device)
        with accelerator.autocast():
            outputs = wrapped(batch.video)
        return loss_terms(outputs, batch, mean.to(accelerator.device), deviation.to(accelerator.device))

    def on_save(average: nn.Module, progress: Progress) -> None:
        assert isinstance(average, ProbeNetwork)
        found, same_face_from = validate(average, unseen)
        log(folder, {"step": progress.step, **found})
        probes.save(folder / "probes", average, same_face_from=same_face_from)

    trained = train(
        network,
        optimizers_of(network, learning_rate),
        loss_of,
        folder=folder,
        budget=budget,
        accelerator=accelerator,
        ema_decay=0.998,
        on_save=on_save,
    )
    assert isinstance(trained, ProbeNetwork)
    return trained


@torch.inference_mode()
def validate(network: ProbeNetwork, examples: Examples) -> tuple[dict[str, float], float]:
    """Return the share of right guesses by attribute, and the similarity from which on two faces count as one."""
    network.eval()
    device = next(network.parameters()).device
    parts = [network(pixels_of(part.to(device))) for part in torch.split(examples.frames, 32)]
    outputs = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    right = {
        name: float((outputs[name].argmax(1) == examples.labels[:, at])[examples.single].float().mean())
        for at, name in enumerate(ATTRIBUTES)
    }
    faces = examples.single & ~examples.looks.isnan().any(1)
    error, threshold = equal_error(outputs["look"][faces], examples.looks[faces])
    return {**{f"{name}_right": share for name, share in right.items()}, "face_error": error}, threshold


def equal_error(looks: Tensor, truths: Tensor) -> tuple[float, float]:
    """Return the equal error rate of telling same from different faces by looks [N, 2, D], and its threshold.

    Every pair counts; `truths` [N, D] are equal for the same face. Without a pair of the same the rate is NaN.
    """
    one, other = torch.triu_indices(len(looks), len(looks), 1)
    similarity = face_similarity(looks[one], looks[other])
    same = (truths[one] == truths[other]).all(1)
    if not same.any() or same.all():
        return float("nan"), 0.5
    candidates = similarity.sort().values
    missed = torch.searchsorted(similarity[same].sort().values, candidates) / same.sum()
    taken = 1 - torch.searchsorted(similarity[~same].sort().values, candidates) / (~same).sum()
    at = int((missed - taken).abs().argmin())
    low = similarity[same & (similarity >= candidates[at])].min() if missed[at] < 1 else candidates[at]
    high = similarity[~same & (similarity < candidates[at])].max() if taken[at] < 1 else candidates[at]
    return float((missed[at] + taken[at]) / 2), float((low + high) / 2)
