"""Ray–solid intersections in a solid's own space, where each solid fills the cube [-1, 1]³.

Each function takes the rays' origins [3, 1, M] and directions [3, R, M] (R rays from each origin, of any length), and
returns the distance to the first hit [R, M] in units of the direction's length, infinite where the ray misses, and the
outward normal there [3, R, M], of any length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Hit = tuple[Tensor, Tensor]
TORUS_RADIUS, TUBE_RADIUS = 0.70, 0.30  # they sum to 1
TINY = 1e-6


def ball(origin: Tensor, direction: Tensor) -> Hit:
    """The unit sphere."""
    a = (direction * direction).sum(0)
    b = (origin * direction).sum(0)
    c = (origin * origin).sum(0) - 1
    discriminant = b * b - a * c
    distance = (-b - discriminant.clamp(min=0).sqrt()) / a
    distance = torch.where((discriminant > 0) & (distance > 0), distance, torch.inf)
    return distance, origin + distance.nan_to_num(posinf=0.0) * direction


def cube(origin: Tensor, direction: Tensor) -> Hit:
    """The cube [-1, 1]³, by slabs."""
    inverse = 1 / torch.where(direction.abs() < TINY, TINY, direction)
    near = (-origin * inverse) - inverse.abs()
    far = (-origin * inverse) + inverse.abs()
    enter, axis = near.max(0)
    leave = far.amin(0)
    distance = torch.where((enter < leave) & (enter > 0), enter, torch.inf)
    normal = torch.zeros_like(direction).scatter_(0, axis[None], -direction.gather(0, axis[None]).sign())
    return distance, normal


def cylinder(origin: Tensor, direction: Tensor) -> Hit:
    """Radius 1 about the y axis, from y = -1 to 1: the part of a round tube inside a slab."""
    ox, oy, oz = origin
    dx, dy, dz = direction
    a = (dx * dx + dz * dz).clamp(min=TINY)
    b = ox * dx + oz * dz
    c = ox * ox + oz * oz - 1
    discriminant = b * b - a * c
    root = discriminant.clamp(min=0).sqrt()
    tube_near, tube_far = (-b - root) / a, (-b + root) / a
    inverse = 1 / torch.where(dy.abs() < TINY, TINY, dy)
    cap_near, cap_far = -oy * inverse - inverse.abs(), -oy * inverse + inverse.abs()
    enter, leave = torch.maximum(tube_near, cap_near), torch.minimum(tube_far, cap_far)
    distance = torch.where((discriminant > 0) & (enter < leave) & (enter > 0), enter, torch.inf)
    at = distance.nan_to_num(posinf=0.0)
    on_side = tube_near > cap_near
    zero = torch.zeros_like(dx)
    normal = torch.stack(
        [
            torch.where(on_side, ox + at * dx, zero),
            torch.where(on_side, zero, -dy.sign()),
            torch.where(on_side, oz + at * dz, zero),
        ]
    )
    return distance, normal


def cone(origin: Tensor, direction: Tensor) -> Hit:
    """Apex at y = 1, base of radius 1 at y = -1."""
    ox, oy, oz = origin
    dx, dy, dz = direction
    height = (1 - oy) / 2  # the cone's radius at the origin's height
    a = dx * dx + dz * dz - dy * dy / 4
    a = torch.where(a.abs() < TINY, TINY, a)
    b = ox * dx + oz * dz + height * dy / 2
    c = ox * ox + oz * oz - height * height
    discriminant = b * b - a * c
    root = discriminant.clamp(min=0).sqrt()
    best = torch.full_like(a, torch.inf)
    for candidate in ((-b - root) / a, (-b + root) / a):
        y = oy + candidate * dy
        valid = (discriminant > 0) & (candidate > 0) & (y > -1) & (y < 1)
        best = torch.where(valid & (candidate < best), candidate, best)
    base = (-1 - oy) / torch.where(dy.abs() < TINY, TINY, dy)
    x, z = ox + base * dx, oz + base * dz
    on_base = (base > 0) & (x * x + z * z < 1) & (base < best)
    distance = torch.where(on_base, base, best)
    at = distance.nan_to_num(posinf=0.0)
    zero = torch.zeros_like(dx)
    normal = torch.stack(
        [
            torch.where(on_base, zero, ox + at * dx),
            torch.where(on_base, -torch.ones_like(dx), (1 - oy - at * dy) / 4),
            torch.where(on_base, zero, oz + at * dz),
        ]
    )
    return distance, normal


def pyramid(origin: Tensor, direction: Tensor) -> Hit:
    """Apex at y = 1, square base [-1, 1]² at y = -1: the meeting of five half-spaces."""
    planes = origin.new_tensor([[2, 1, 0, 1], [-2, 1, 0, 1], [0, 1, 2, 1], [0, 1, -2, 1], [0, -1, 0, 1]])
    normals, offsets = planes[:, :3], planes[:, 3:]
    approach = torch.tensordot(normals, direction, 1)
    approach = torch.where(approach.abs() < TINY, TINY, approach)
    crossing = (offsets[:, :, None] - torch.tensordot(normals, origin, 1)) / approach
    enter, face = torch.where(approach < 0, crossing, -torch.inf).max(0)
    leave = torch.where(approach > 0, crossing, torch.inf).amin(0)
    distance = torch.where((enter < leave) & (enter > 0), enter, torch.inf)
    return distance, normals.T[:, face]


def ring(origin: Tensor, direction: Tensor) -> Hit:
    """A torus about the z axis, by walking along the ray as far as the distance to the torus allows."""
    length = (direction * direction).sum(0).sqrt()
    unit = direction / length
    middle = -(origin * unit).sum(0)
    reach = 1 - (origin * origin).sum(0) + middle * middle
    travelled = middle - reach.clamp(min=0).sqrt()
    for _ in range(12):
        x, y, z = origin + travelled * unit
        gap = ((x * x + y * y).sqrt() - TORUS_RADIUS).square().add_(z * z).sqrt() - TUBE_RADIUS
        travelled = travelled + gap
    x, y, z = origin + travelled * unit
    around = (x * x + y * y).sqrt().clamp(min=TINY)
    shrink = 1 - TORUS_RADIUS / around
    distance = torch.where((reach > 0) & (gap < 0.02) & (travelled > 0), travelled / length, torch.inf)
    return distance, torch.stack([x * shrink, y * shrink, z])


INTERSECT: dict[str, Callable[[Tensor, Tensor], Hit]] = {
    "ball": ball,
    "cube": cube,
    "cone": cone,
    "cylinder": cylinder,
    "ring": ring,
    "pyramid": pyramid,
}
