"""Probes: a small network that reads out of a video what is in it, and says when it cannot.

They see two seconds: the middle square of nine frames at 128×128. Three are looked at closely, which tells where the
subject is; there it is looked at from near, in five frames for its face and in all for how it turns; and all frames,
halved in size, are watched for movement. One subject is read; of clips with two only the scene and the camera count.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vgen.errors import CheckpointError, UsageError
from vgen.toyland.looks import LOOK_SIZE
from vgen.toyland.prompts import ATTRIBUTES

NUM_FRAMES, SIDE, SECONDS = 9, 128, 2.0
LOOK_FRAMES, FACE_FRAMES = (0, 4, 8), (0, 2, 4, 6, 8)
ATTENTION_SIDE = 16
FACE_SIDE, TURN_SIDE = 48, 32  # pixels of what is looked at from near, for its face and for how it turns
NEAR_MARGIN = 1.25  # half its side, in radii of the subject
VARIANCES = (0.01, 0.99)  # of what is thought of a look's number, which over all heads has a variance of 1
PATH_SIZE = 15  # numbers per frame of the subject's place and the camera's pose; see training/passed.py
VERDICTS = ("picture", "subject", "order")
"""What must hold for a reading to mean anything: the frames show Toyland, one subject is in sight, time runs on."""
NEEDS = {
    "scene": ("picture",),
    "colour": ("picture", "subject"),
    "shape": ("picture", "subject"),
    "size": ("picture", "subject"),
    "action": ("picture", "subject", "order"),
    "camera": ("picture", "order"),
}
READABLE = 0.5  # the confidence from which on a reading counts
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Block(nn.Module):
    """A residual block of two 3×3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape [N, C, H, W]."""
        hidden = self.first(nn.functional.silu(self.norm(x)))
        grown: Tensor = x + self.second(nn.functional.silu(hidden))
        return grown


class Look(nn.Module):
    """Looks at frames closely: features of the subject, where it is and how far it spreads, and of all around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width // 2, 4, stride=4)
        self.down = nn.Conv2d(width // 2 + 2, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(width), Block(width), nn.GroupNorm(8, width), nn.SiLU())
        self.attention = nn.Conv2d(width, 1, 1)
        self.num_features = 2 * width + 4

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [N, num_features] and attention logits [N, ATTENTION_SIDE²] of frames [N, 3, SIDE, SIDE]."""
        x = nn.functional.silu(self.stem(frames))
        x = self.blocks(self.down(torch.cat([x, places(x)], 1))).flatten(2).float()  # [N, C, cells]
        logits = self.attention(x[..., None])[:, 0, :, 0].float()
        attention = logits.softmax(1)
        across = torch.linspace(-1, 1, ATTENTION_SIDE, device=x.device)
        cells = torch.stack(torch.meshgrid(across, across, indexing="ij")).flatten(1)  # [2, cells]
        centre = attention @ cells.T
        spread = (attention @ cells.square().T - centre.square()).clamp(min=1e-5).sqrt()
        subject = (x @ attention[:, :, None])[:, :, 0]
        return torch.cat([subject, x.mean(2), centre, 2 * spread], 1), logits


class Face(nn.Module):
    """Looks at the subject of a frame from near: what it takes a toy head to look like, and how well that is seen."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            Block(width),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            Block(2 * width),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 32, 1),
            nn.Flatten(),
            nn.Linear(32 * (FACE_SIDE // 8) ** 2, 256),
            nn.LayerNorm(256),
            nn.SiLU(),
            nn.Linear(256, 2 * LOOK_SIZE),
        )

    def forward(self, near: Tensor) -> Tensor:
        """Return looks [N, 2, LOOK_SIZE] of subjects from near in some frames each, [N, frames, 3, FACE_SIDE²].

        A frame counts for each number as much as it is sure of it: heads turn away, and come near.
        """
        frames = near.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        found = self.layers(frames).float().view(*near.shape[:2], 2, LOOK_SIZE)
        weight = found[:, :, 1].softmax(1)
        number, sureness = (weight[:, :, None] * found).sum(1).unbind(1)
        return torch.stack([number, (-sureness).sigmoid().clamp(*VARIANCES)], 1)


class Motion(nn.Module):
    """Watches all frames, small and at once, as the channels of one picture: features of what moves where."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3 * NUM_FRAMES, width // 2, 5, stride=2, padding=2),
            nn.GroupNorm(8, width // 2),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            Block(width),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            Block(2 * width),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 32, 1),
        )
        self.num_features = 32 * (SIDE // 16) ** 2

    def forward(self, video: Tensor) -> Tensor:
        """Return features [N, num_features] of all frames [N, 3 * NUM_FRAMES, SIDE / 2, SIDE / 2]."""
        features: Tensor = self.layers(video).flatten(1).float()
        return features


class Turn(nn.Module):
    """Watches the subject from near in all frames at once: features of how it turns, and of its shape."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3 * NUM_FRAMES, width, 5, stride=2, padding=2),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            Block(2 * width),
            Block(2 * width),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 32, 1),
        )
        self.num_features = 32 * (TURN_SIDE // 4) ** 2

    def forward(self, near: Tensor) -> Tensor:
        """Return features [N, num_features] of subjects from near, [N, NUM_FRAMES, 3, TURN_SIDE, TURN_SIDE]."""
        frames = near.flatten(1, 2).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.layers(frames).flatten(1).float()
        return features


class ProbeNetwork(nn.Module):
    """All ways of seeing, brought together, and a linear reading for everything."""

    def __init__(self, look_width: int = 64, motion_width: int = 96, hidden: int = 384, dropout: float = 0.1) -> None:
        super().__init__()
        self.look, self.motion, self.turn = Look(look_width), Motion(motion_width), Turn()
        features = len(LOOK_FRAMES) * self.look.num_features + self.motion.num_features + self.turn.num_features
        self.join = nn.Sequential(nn.Linear(features, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Dropout(dropout))
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, len(values)) for name, values in ATTRIBUTES.items()})
        self.verdicts = nn.Linear(hidden, len(VERDICTS))
        self.path = nn.Linear(hidden, NUM_FRAMES * PATH_SIZE)
        self.face = Face()

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        """Return, for videos [N, 3, NUM_FRAMES, SIDE, SIDE] in [-1, 1]:

        logits [N, values] by attribute, "verdicts" [N, 3], "look" [N, 2, LOOK_SIZE], and what only training uses:
        "attention" [N, LOOK_FRAMES, cells] and "path" [N, NUM_FRAMES, PATH_SIZE].
        """
        count, frames = len(video), video.transpose(1, 2)
        looked_at = frames[:, list(LOOK_FRAMES)].flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features, attention = self.look(looked_at)
        features, attention = features.view(count, -1), attention.view(count, len(LOOK_FRAMES), -1)
        where = boxes(attention.detach())
        small = nn.functional.avg_pool2d(video.flatten(1, 2), 2).contiguous(memory_format=torch.channels_last)
        turn = self.turn(crops(frames, where, TURN_SIDE))
        joined = self.join(torch.cat([features, self.motion(small), turn], 1))
        faces = list(FACE_FRAMES)
        return {
            **{name: head(joined).float() for name, head in self.heads.items()},
            "verdicts": self.verdicts(joined).float(),
            "look": self.face(crops(frames[:, faces], where[:, faces], FACE_SIDE)),
            "attention": attention,
            "path": self.path(joined).float().view(count, NUM_FRAMES, PATH_SIZE),
        }


def boxes(attention: Tensor) -> Tensor:
    """Return where the subject is in every frame, [N, NUM_FRAMES, 3]: a square's centre (x, y) and half its side.

    Attention logits [N, LOOK_FRAMES, cells] tell it of some frames; those between are interpolated. The whole frame
    has its centre at (0, 0), and half its side is 1.
    """
    weight = attention.float().softmax(2)
    across = (torch.arange(ATTENTION_SIDE, device=attention.device) + 0.5) * 2 / ATTENTION_SIDE - 1
    y, x = (axis.flatten() for axis in torch.meshgrid(across, across, indexing="ij"))
    cells = torch.stack([x, y], 1)
    centre = weight @ cells  # [N, LOOK_FRAMES, 2]
    deviation = (weight @ cells.square() - centre.square()).clamp(min=0).sqrt().amax(2, keepdim=True)
    half = (NEAR_MARGIN * 2 * deviation).clamp(0.15, 1)  # a disc's deviation along an axis is half its radius
    looked_at = torch.cat([centre, half], 2).transpose(1, 2)
    return nn.functional.interpolate(looked_at, NUM_FRAMES, mode="linear", align_corners=True).transpose(1, 2)


def crops(frames: Tensor, where: Tensor, side: int) -> Tensor:
    """Return the part of frames [N, F, 3, SIDE, SIDE] in the boxes `where` [N, F, 3], [N, F, 3, side, side]."""
    centre, half = where[..., :2, None], where[..., 2:, None]
    affine = torch.cat([half * torch.eye(2, device=frames.device), centre], 3).flatten(0, 1)
    grid = nn.functional.affine_grid(affine, [len(affine), 3, side, side], align_corners=False)
    near = nn.functional.grid_sample(frames.flatten(0, 1).float(), grid, padding_mode="border", align_corners=False)
    return near.view(*frames.shape[:3], side, side)


def places(frames: Tensor) -> Tensor:
    """Return each pixel's own place, x and y in [-1, 1], as channels [N, 2, H, W]."""
    rows, columns = (torch.linspace(-1, 1, side, device=frames.device) for side in frames.shape[2:])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y]).to(frames.dtype).expand(len(frames), -1, -1, -1)


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What the probes read in one video."""

    guesses: dict[str, str]
    """The likeliest value of every attribute."""
    confidences: dict[str, float]
    """How likely it is, in [0, 1], times how likely the video can be read at all."""
    look: Tensor
    """float32 [2, LOOK_SIZE]: what the head looks like, to be compared by `same_face`: numbers, and the variance with
    which each is known. Of other subjects it means nothing."""

    def __getitem__(self, attribute: str) -> str | None:
        """Return what is read, or None where it is unreadable."""
        return self.guesses[attribute] if self.confidences[attribute] >= READABLE else None

    def to_dict(self) -> dict[str, str | None]:
        """Return the reading of every attribute."""
        return {name: self[name] for name in self.guesses}


class Probes:
    """Trained probes, ready to read."""

    def __init__(self, network: ProbeNetwork, *, same_face_from: float) -> None:
        self.network = network.eval().requires_grad_(False)
        self.same_face_from = same_face_from

    @torch.inference_mode()
    def read(self, videos: Sequence[Tensor | NDArray[np.uint8]], fps: float = 8.0) -> list[Readings]:
        """Return the readings of videos, uint8 [F, H, W, 3] each, of their first two seconds. See `prepare`."""
        if not videos:
            return []
        outputs = self.network(torch.stack([prepare(frames, fps) for frames in videos]))
        verdicts = outputs["verdicts"].sigmoid()
        possible = {
            name: verdicts[:, [VERDICTS.index(need) for need in needs]].amin(1) for name, needs in NEEDS.items()
        }
        best = {name: outputs[name].softmax(1).max(1) for name in ATTRIBUTES}
        return [
            Readings(
                guesses={name: values[int(best[name].indices[index])] for name, values in ATTRIBUTES.items()},
                confidences={name: float(best[name].values[index] * possible[name][index]) for name in ATTRIBUTES},
                look=outputs["look"][index],
            )
            for index in range(len(videos))
        ]

    def same_face(self, first: Readings, second: Readings) -> bool:
        """Return whether two readings are of the same toy head."""
        return bool(face_similarity(first.look, second.look) >= self.same_face_from)


def face_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return how much likelier two looks [..., 2, LOOK_SIZE] are one head than two, as a logarithm [...].

    Each tells of every number a normal distribution, and over all heads it is the standard one: what one of the two
    cannot see counts little. After Shi and Jain, "Probabilistic Face Embeddings", 2019, with the prior taken out.
    """
    (number, variance), (other, other_variance) = first.unbind(-2), second.unbind(-2)
    precision = 1 / variance + 1 / other_variance - 1
    both = (number / variance + other / other_variance).square() / precision
    apart = number.square() / variance + other.square() / other_variance
    return (both - apart - (precision * variance * other_variance).log()).sum(-1) / 2


def prepare(frames: Tensor | NDArray[np.uint8], fps: float = 8.0) -> Tensor:
    """Return what the network takes, [3, NUM_FRAMES, SIDE, SIDE] in [-1, 1], of frames uint8 [F, H, W, 3].

    The middle square of a wide video is taken, which shows what a square render shows; a tall one is widened by its
    edges. A video that ends before two seconds holds its last frame; a picture [H, W, 3] is a video of one frame.
    """
    video = torch.tensor(frames) if isinstance(frames, np.ndarray) else frames
    video = video[None] if video.ndim == 3 else video
    if video.ndim != 4 or video.shape[3] != 3 or not len(video):
        raise UsageError(f"Probes read frames [F, H, W, 3], not {list(video.shape)}.")
    seconds = torch.linspace(0, SECONDS, NUM_FRAMES)
    picks = (seconds * fps).round().long().clamp(max=len(video) - 1)
    video = video[picks].permute(0, 3, 1, 2).float() / 127.5 - 1
    height, width = video.shape[2:]
    if width > height:
        left = (width - height) // 2
        video = video[..., left : left + height]
    elif width < height:
        short = height - width
        video = nn.functional.pad(video, (short // 2, short - short // 2, 0, 0), mode="replicate")
    if video.shape[2] != SIDE:
        video = nn.functional.interpolate(video, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    return video.transpose(0, 1).contiguous()


def save(folder: Path, network: ProbeNetwork, *, same_face_from: float) -> None:
    """Write the probes as float16 safetensors, and what belongs to them, into `folder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    facts = {"same_face_from": round(same_face_from, 4), **{name: list(values) for name, values in ATTRIBUTES.items()}}
    (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load(folder: Path | None = None) -> Probes:
    """Return the probes in `folder`, or those that vgen carries; raise `CheckpointError` where they are not usable."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = folder or Path(str(importlib.resources.files("vgen"))) / "toyland" / "probes"
    network = ProbeNetwork()
    try:
        facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        network.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot load the probes in {folder}: {str(error).splitlines()[0]}",
            tip="train them: vgen train probes --minutes 60.",
        ) from error
    if any(facts.get(name) != list(values) for name, values in ATTRIBUTES.items()):
        raise CheckpointError(f"The probes in {folder} were trained on other attributes.", tip="train them again.")
    return Probes(network, same_face_from=facts["same_face_from"])
