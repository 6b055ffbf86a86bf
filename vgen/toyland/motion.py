"""Where subjects and the camera are at a time: functions of seconds, so that any clip can be continued."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from vgen.toyland.scene import Clip, Subject

WALK_SPEED = 1.1  # metres per second, for moves left and right
APPROACH_SPEED = 1.4  # metres per second, for comes closer and goes away
CLIMB_SPEED, CLIMB_HEIGHT = 1.0, 2.0  # metres per second, metres; a fall starts at that height
JUMP_HEIGHT, JUMP_PERIOD = 1.1, 1.0  # metres, seconds
CIRCLE_RADIUS, CIRCLE_PERIOD = 0.95, 2.25  # metres, seconds
SPIN_SPEED = math.pi  # radians per second


def displacement(action: str, seconds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dy, dz, turn) of `action` after `seconds` [F]: metres and radians, each [F]."""
    zero = torch.zeros_like(seconds)
    match action:
        case "stays":
            return zero, zero, zero, zero
        case "moves left":
            return -WALK_SPEED * seconds, zero, zero, zero
        case "moves right":
            return WALK_SPEED * seconds, zero, zero, zero
        case "comes closer":
            return zero, zero, APPROACH_SPEED * seconds, zero
        case "goes away":
            return zero, zero, -APPROACH_SPEED * seconds, zero
        case "jumps":
            phase = (seconds / JUMP_PERIOD) % 1.0
            return zero, JUMP_HEIGHT * 4 * phase * (1 - phase), zero, zero
        case "circles":
            angle = 2 * math.pi * seconds / CIRCLE_PERIOD
            return CIRCLE_RADIUS * torch.sin(angle), zero, CIRCLE_RADIUS * (torch.cos(angle) - 1), zero
        case "spins":
            return zero, zero, zero, SPIN_SPEED * seconds
        case "rises":
            return zero, (CLIMB_SPEED * seconds).clamp(max=CLIMB_HEIGHT), zero, zero
        case "falls":
            return zero, (CLIMB_HEIGHT - CLIMB_SPEED * seconds).clamp(min=0), zero, zero
    raise AssertionError(f"unknown action {action!r}")


def subject_track(subject: Subject, seconds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (x, lift, z, heading) of a subject at `seconds` [F], each [F]; lift is the height of its foot.

    Each action of the script goes on from where the one before it ended; only heights are an action's own, so that
    a jump that is cut short comes down.
    """
    x = torch.full_like(seconds, subject.place[0])
    z = torch.full_like(seconds, subject.place[1])
    heading = torch.full_like(seconds, subject.heading)
    lift = torch.zeros_like(seconds)
    ends = [start for start, _ in subject.actions[1:]] + [math.inf]
    for (start, action), end in zip(subject.actions, ends, strict=True):
        dx, dy, dz, turn = displacement(action, seconds.clamp(start, end) - start)
        x, z, heading = x + dx, z + dz, heading + turn
        lift = torch.where((seconds >= start) & (seconds < end), dy, lift)
    return x, lift, z, heading


EYE = (0.0, 1.75, 6.6)  # metres: where a static camera stands
TARGET = (0.0, 0.95, 0.0)  # metres: what it looks at


def camera_track(clip: Clip, seconds: Tensor) -> Tensor:
    """Return world-to-camera extrinsics [F, 4, 4] (OpenCV axes: x right, y down, z forward) at `seconds` [F].

    Moves pass through the plain view at one second, so that two seconds of any of them keep the subject in view.
    """
    rng = random.Random(clip.layout)
    eye = torch.tensor([EYE[i] + rng.uniform(-0.12, 0.12) for i in range(3)]).expand(len(seconds), 3).clone()
    yaw, pitch, roll = (torch.zeros_like(seconds) for _ in range(3))
    target = torch.tensor(TARGET).expand(len(seconds), 3).clone()
    t = seconds - 1.0
    match clip.camera:
        case "static":
            pass
        case "pan left" | "pan right":
            yaw = math.radians(13) * t * (1 if clip.camera == "pan left" else -1)
        case "tilt up" | "tilt down":
            pitch = math.radians(9) * t * (1 if clip.camera == "tilt up" else -1)
        case "dolly in" | "dolly out":
            step = (
                (target[:1] - eye[:1]) / (target[:1] - eye[:1]).norm() * (1.2 if clip.camera == "dolly in" else -1.2)
            )
            eye, target = eye + step * t[:, None], target + step * t[:, None]
        case "truck left" | "truck right":
            step = torch.tensor([[-1.0 if clip.camera == "truck left" else 1.0, 0.0, 0.0]])
            eye, target = eye + step * t[:, None], target + step * t[:, None]
        case "orbit left" | "orbit right":
            angle = math.radians(20) * t * (-1 if clip.camera == "orbit left" else 1)
            x, z = eye[:, 0].clone(), eye[:, 2].clone()
            eye[:, 0] = x * angle.cos() + z * angle.sin()
            eye[:, 2] = z * angle.cos() - x * angle.sin()
        case "roll":
            roll = math.radians(13) * seconds
        case "wander":
            for axis in range(3):
                for _ in range(2):
                    rate, phase, size = rng.uniform(0.6, 2.2), rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 0.35)
                    eye[:, axis] += size * torch.sin(rate * seconds + phase)
            eye[:, 1].clamp_(min=0.5)
        case _:
            raise AssertionError(f"unknown camera {clip.camera!r}")
    return look_at(eye, target, yaw, pitch, roll)


def look_at(eye: Tensor, target: Tensor, yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Return extrinsics [F, 4, 4] of a camera at `eye` [F, 3] facing `target` [F, 3], then turned by angles [F].

    Positive yaw turns left, positive pitch up, positive roll turns the picture clockwise.
    """
    ahead = torch.nn.functional.normalize(target - eye, dim=-1)
    heading = torch.atan2(ahead[:, 0], -ahead[:, 2]) - yaw
    slope = torch.asin(ahead[:, 1]) + pitch
    forward = torch.stack([heading.sin() * slope.cos(), slope.sin(), -heading.cos() * slope.cos()], -1)
    right = torch.stack([heading.cos(), torch.zeros_like(heading), heading.sin()], -1)
    down = torch.cross(forward, right, dim=-1)
    cos, sin = roll.cos()[:, None], roll.sin()[:, None]
    right, down = right * cos - down * sin, right * sin + down * cos
    extrinsics = torch.eye(4).repeat(len(eye), 1, 1)
    rotation = torch.stack([right, down, forward], 1)
    extrinsics[:, :3, :3] = rotation
    extrinsics[:, :3, 3] = -(rotation @ eye[:, :, None])[:, :, 0]
    return extrinsics
