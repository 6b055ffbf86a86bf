"""Clips → frames and their truth, by casting rays from a pinhole camera. Batched torch; CPU or GPU; no randomness.

Ground and sky are smooth functions of a pixel's ray and need one sample. Solids need antialiasing: each is traced with
2×2 rays per pixel, only inside its box on the screen. Shapes below: B clips, F frames, N = views in flight,
P = pixels of a view, K = subjects (always 2; an absent one is empty).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.toyland import face, motion, scenery, solids
from vgen.toyland.scene import COLOURS, IDENTITY_SIZE, SIZES, Clip, Subject

FIELD_OF_VIEW = 50.0  # degrees, vertical
MAX_SUBJECTS = 2
PIXELS_IN_FLIGHT = 400_000  # keeps the work of one pass in the cache
SUBSAMPLES = ((0.125, 0.375), (0.375, -0.125), (-0.125, -0.375), (-0.375, 0.125))  # a rotated grid
NEAR, FAR = 0.1, 1e4  # metres

KINDS = tuple(solids.INTERSECT)
PAINTS = ("plain", "panels", "glow", "face")
BODY: dict[str, tuple[float, float, float]] = {
    "ball": (1.0, 1.0, 1.0),
    "cube": (0.82, 0.82, 0.82),
    "cone": (0.92, 1.12, 0.92),
    "cylinder": (0.68, 1.0, 0.68),
    "ring": (1.05, 1.05, 1.05),
    "pyramid": (0.98, 1.05, 0.98),
}  # half sizes of each solid, in units of SIZES


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """Frames and their truth."""

    frames: Tensor
    """uint8 [B, F, H, W, 3], display RGB."""
    masks: Tensor
    """uint8 [B, K, F, H, W]: the share of each pixel that a subject covers, 255 = all."""
    depth: Tensor
    """float32 [B, F, H, W]: metres along the viewing axis to the nearest surface; FAR for the sky."""
    tracks: Tensor
    """float32 [B, K, F, 3]: the centre of each subject in the world, metres; NaN for an absent one."""
    pixel_tracks: Tensor
    """float32 [B, K, F, 2]: the same on the screen, pixels from the top left corner."""
    extrinsics: Tensor
    """float32 [B, F, 4, 4]: world to camera, OpenCV axes."""
    intrinsics: Tensor
    """float32 [3, 3], pixels."""


@dataclass(frozen=True)
class Parts:
    """All solids of all views in flight, Q of them, sorted by kind."""

    kind: Tensor  # [Q] index into KINDS
    view: Tensor  # [Q]
    owner: Tensor  # [Q] subject index, or -1 for a landmark
    half: Tensor  # [Q, 3]
    centre: Tensor  # [Q, 3]
    heading: Tensor  # [Q]
    colour: Tensor  # [Q, 3]
    accent: Tensor  # [Q, 3] the second colour: hair of a face
    paint: Tensor  # [Q] index into PAINTS
    identity: Tensor  # [Q, IDENTITY_SIZE]


def intrinsics_of(height: int, width: int) -> Tensor:
    """Return the pinhole intrinsics [3, 3] in pixels."""
    focal = 0.5 * height / math.tan(math.radians(FIELD_OF_VIEW / 2))
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])


def half_height(subject: Subject) -> float:
    """Return half the height of a subject without its hat, in metres."""
    return SIZES[subject.size] * (0.86 if subject.shape == "head" else BODY[subject.shape][1])


def subject_parts(subject: Subject) -> list[scenery.Part]:
    """Return the parts of a subject, in metres from its foot."""
    size = SIZES[subject.size]
    if subject.shape == "head":
        parts = face.head_parts(subject.identity, subject.colour)
    else:
        body = BODY[subject.shape]
        parts = [(subject.shape, body, (0.0, body[1], 0.0), COLOURS[subject.colour], "panels")]
    return [
        (
            kind,
            (half[0] * size, half[1] * size, half[2] * size),
            (at[0] * size, at[1] * size, at[2] * size),
            rgb,
            paint,
        )
        for kind, half, at, rgb, paint in parts
    ]


@torch.no_grad()
def render(
    clips: list[Clip],
    *,
    num_frames: int = 17,
    height: int = 128,
    width: int = 128,
    fps: float = 8.0,
    start: float = 0.0,
    device: str | torch.device = "cpu",
) -> Rendered:
    """Return the frames of `clips` from second `start` on, with masks, depth, tracks and cameras."""
    group = max(1, PIXELS_IN_FLIGHT // (num_frames * height * width))
    passes = [
        render_group(clips[at : at + group], num_frames, height, width, fps, start, torch.device(device))
        for at in range(0, len(clips), group)
    ]
    joined = {
        name: torch.cat([getattr(one, name) for one in passes])
        for name in ("frames", "masks", "depth", "tracks", "pixel_tracks", "extrinsics")
    }
    return Rendered(**joined, intrinsics=passes[0].intrinsics)


def render_group(
    clips: list[Clip], num_frames: int, height: int, width: int, fps: float, start: float, device: torch.device
) -> Rendered:
    """Return what `render` returns for as many clips as fit into one pass."""
    seconds = start + torch.arange(num_frames) / fps
    extrinsics = torch.stack([motion.camera_track(clip, seconds) for clip in clips])  # [B, F, 4, 4]
    parts, tracks = place_parts(clips, seconds)
    intrinsics = intrinsics_of(height, width)

    projected = (extrinsics[:, None, :, :3, :3] @ tracks[..., None])[..., 0] + extrinsics[:, None, :, :3, 3]
    pixel_tracks = projected[..., :2] / projected[..., 2:] * intrinsics[0, 0] + intrinsics[:2, 2]

    views = extrinsics.flatten(0, 1).to(device)
    parts = Parts(**{name: value.to(device) for name, value in vars(parts).items()})
    suns = torch.tensor([scenery.sun_direction(clip.layout) for clip in clips], device=device)
    suns = suns.repeat_interleave(num_frames, 0)
    colour, depth = render_background(clips, views, intrinsics, suns, parts, height, width)
    frames, masks, depth = render_parts(parts, views, intrinsics, suns, clips, colour, depth, height, width)
    shape = (len(clips), num_frames, height, width)
    return Rendered(
        frames=(frames * 255).round_().to(torch.uint8).view(*shape, 3),
        masks=(masks * 255).round_().to(torch.uint8).view(MAX_SUBJECTS, *shape).transpose(0, 1),
        depth=depth.view(shape),
        tracks=tracks,
        pixel_tracks=pixel_tracks,
        extrinsics=extrinsics,
        intrinsics=intrinsics,
    )


def place_parts(clips: list[Clip], seconds: Tensor) -> tuple[Parts, Tensor]:
    """Return every solid of every view at `seconds` [F], and the subjects' tracks [B, K, F, 3]."""
    frames = len(seconds)
    tracks = torch.full((len(clips), MAX_SUBJECTS, frames, 3), torch.nan)
    kinds, owners, halves, centres, headings, colours, accents, paints, identities, views = ([] for _ in range(10))

    def add(clip: int, owner: int, part: scenery.Part, foot: Tensor, heading: Tensor, subject: Subject | None) -> None:
        kind, half, offset, colour, paint = part
        cos, sin = heading.cos(), heading.sin()
        turned = torch.stack(
            [offset[0] * cos + offset[2] * sin, torch.full_like(cos, offset[1]), offset[2] * cos - offset[0] * sin], -1
        )
        identity = subject.identity if subject and subject.identity else (0.0,) * IDENTITY_SIZE
        accent = face.hair_colour(identity, subject.colour) if subject and paint == "face" else colour
        kinds.append(KINDS.index(kind))
        owners.append(owner)
        halves.append(half)
        centres.append(foot + turned)
        headings.append(heading)
        colours.append(colour)
        accents.append(accent)
        paints.append(PAINTS.index(paint))
        identities.append(identity)
        views.append(clip * frames + torch.arange(frames))

    for index, clip in enumerate(clips):
        for owner, subject in enumerate(clip.subjects):
            x, lift, z, heading = motion.subject_track(subject, seconds)
            tracks[index, owner] = torch.stack([x, lift + half_height(subject), z], -1)
            for part in subject_parts(subject):
                add(index, owner, part, torch.stack([x, lift, z], -1), heading, subject)
        still = torch.zeros(frames)
        for name, x_at, z_at, scale in scenery.place_landmarks(clip.scene, clip.layout):
            foot = torch.tensor([x_at, 0.0, z_at]).expand(frames, 3)
            for kind, half, at, rgb, paint in scenery.LANDMARKS[name]:
                scaled = (half[0] * scale, half[1] * scale, half[2] * scale)
                moved = (at[0] * scale, at[1] * scale, at[2] * scale)
                add(index, -1, (kind, scaled, moved, rgb, paint), foot, still, None)

    def spread(values: object) -> Tensor:
        return torch.tensor(values).repeat_interleave(frames, 0)

    order = spread(kinds).argsort(stable=True)
    parts = Parts(
        kind=spread(kinds)[order],
        view=torch.cat(views)[order],
        owner=spread(owners)[order],
        half=spread(halves)[order],
        centre=torch.cat(centres)[order],
        heading=torch.cat(headings)[order],
        colour=spread(colours)[order],
        accent=spread(accents)[order],
        paint=spread(paints)[order],
        identity=spread(identities)[order],
    )
    return parts, tracks


def render_background(
    clips: list[Clip], views: Tensor, intrinsics: Tensor, suns: Tensor, parts: Parts, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return ground and sky with the subjects' shadows: colour [N, P, 3] and depth [N, P]."""
    device = views.device
    frames = len(views) // len(clips)
    looks = [scenery.SCENERY[clip.scene] for clip in clips]

    def per_view(values: list[tuple[float, ...]]) -> Tensor:
        return torch.tensor(values, device=device).repeat_interleave(frames, 0)[:, None]  # [N, 1, …]

    focal = intrinsics[0, 0]
    u = (torch.arange(width, device=device) + 0.5 - width / 2) / focal
    v = (torch.arange(height, device=device) + 0.5 - height / 2) / focal
    pixels = torch.stack([u.repeat(height), v.repeat_interleave(width), torch.ones(height * width, device=device)])
    rotation = views[:, :3, :3]
    eyes = -(rotation.transpose(1, 2) @ views[:, :3, 3:])[:, :, 0]  # [N, 3]
    dx, dy, dz = (rotation.transpose(1, 2) @ pixels).unbind(1)  # each [N, P]
    length = (dx * dx + dy * dy + dz * dz).sqrt()

    down = dy < -1e-4
    distance = torch.where(down, -eyes[:, 1:2] / dy.clamp(max=-1e-4), FAR)
    x, z = eyes[:, 0:1] + distance * dx, eyes[:, 2:3] + distance * dz
    tile = scenery.noise_tile().to(device)
    offset = per_view([((clip.layout % 251) * 1.0, (clip.layout % 241) * 1.0) for clip in clips])
    rise = dy.clamp(min=0.02) / length
    texel_u = torch.where(down, x * 24, 24 * dx / length / rise) + offset[..., 0]
    texel_v = torch.where(down, z * 24, 24 * dz / length / rise) + offset[..., 1]
    fine = scenery.sample_noise(tile, texel_u, texel_v)
    coarse = scenery.sample_noise(tile, texel_u * 0.23 + 90, texel_v * 0.23)
    sharp = (1.6 - distance * length / focal * 12).clamp(0, 1)  # fade what is finer than a pixel
    smooth = (2.0 - distance * length / focal * 3).clamp(0, 1)
    texture = 0.5 + 0.16 * (fine - 0.5) * sharp + 0.7 * (coarse - 0.5) * smooth

    ground = torch.lerp(
        per_view([look.ground[0] for look in looks]),
        per_view([look.ground[1] for look in looks]),
        texture.clamp(0, 1)[..., None],
    )
    if any(look.sea for look in looks):
        deep, light = torch.tensor(scenery.SEA, device=device)
        sea = torch.lerp(deep, light, texture[..., None])
        wash = ((scenery.SHORE - z + 0.5 * (coarse - 0.5)) * 3).clamp(0, 1)
        foam = (1 - (wash - 0.35).abs() * 3).clamp(0, 1)[..., None] * 0.6
        wet = (sea + (1 - sea) * foam) * wash[..., None] + ground * (1 - wash[..., None])
        ground = torch.where(per_view([(float(look.sea),) for look in looks]) > 0.5, wet, ground)
    shade = shadows(parts, suns, x, z)
    ground = ground * (1 - 0.62 * shade)[..., None]

    climb = (dy / length).clamp(0, 1)
    sky = torch.lerp(
        per_view([look.horizon for look in looks]), per_view([look.zenith for look in looks]), climb.sqrt()[..., None]
    )
    cloudy = ((coarse + 0.1 * fine - 0.6) * 1.8).clamp(0, 1) * (climb * 4).clamp(0, 1) * 0.7
    sky = torch.lerp(sky, per_view([look.cloud for look in looks]), cloudy[..., None])
    starry = [view for view in range(len(views)) if looks[view // frames].stars]
    if starry:
        stars = scenery.stars(torch.atan2(dx[starry], -dz[starry]), torch.asin((dy / length)[starry].clamp(-1, 1)))
        sky[starry] += (1 - sky[starry]) * stars[..., None]
    haze = (1 - 14 / (distance * length).clamp(min=14)).clamp(0, 1)[..., None] ** 1.5
    ground = torch.lerp(ground, per_view([look.horizon for look in looks]), haze)
    colour = torch.where(down[..., None], ground, sky)
    return colour, distance.clamp(max=FAR)


def shadows(parts: Parts, suns: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """Return how much of the sun [N, P] the subjects take from ground points (x, 0, z), each [N, P].

    A part's shadow is its ellipsoid's: 1 where the ray towards the sun passes its centre, 0 where it misses.
    """
    shade = torch.zeros_like(x)
    casting = (parts.owner >= 0).nonzero()[:, 0]
    casting = casting[parts.view[casting].argsort(stable=True)]
    view = parts.view[casting]
    rank = torch.arange(len(view), device=x.device) - torch.searchsorted(view, view)  # 0 for a view's first caster, …
    for turn in range(int(rank.max()) + 1):
        one = casting[rank == turn]  # at most one caster a view
        views, half, centre = parts.view[one], parts.half[one], parts.centre[one] / parts.half[one]
        sun = torch.nn.functional.normalize(suns[views] / half, dim=1)
        wx, wz = centre[:, 0:1] - x[views] / half[:, 0:1], centre[:, 2:3] - z[views] / half[:, 2:3]
        wy = centre[:, 1:2]
        along = wx * sun[:, 0:1] + wy * sun[:, 1:2] + wz * sun[:, 2:3]
        miss = (wx * wx + wy * wy + wz * wz - along * along).clamp(min=0).sqrt()
        shade[views] = torch.maximum(shade[views], ((1.15 - miss) * 2.2).clamp(0, 1))
    return shade


def render_parts(
    parts: Parts,
    views: Tensor,
    intrinsics: Tensor,
    suns: Tensor,
    clips: list[Clip],
    background: Tensor,
    depth: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return colour [N, P, 3], masks [K, N, P] and depth [N, P] with all solids drawn over the background."""
    device = views.device
    num_views, num_pixels = depth.shape
    focal = intrinsics[0, 0]
    rotation, shift = views[parts.view, :3, :3], views[parts.view, :3, 3]
    cos, sin, zero, one = (parts.heading.cos(), parts.heading.sin(), *torch.tensor([0.0, 1.0], device=device))
    zero, one = zero.expand_as(cos), one.expand_as(cos)
    turn = torch.stack([cos, zero, -sin, zero, one, zero, sin, zero, cos], 1).view(-1, 3, 3)  # world → own axes

    # The box on the screen [Q] that each solid's eight corners span.
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), device=device)
    corners = (corners * parts.half[:, None]) @ turn + parts.centre[:, None]
    corners = corners @ rotation.transpose(1, 2) + shift[:, None]  # [Q, 8, 3] in the camera
    ahead = corners[:, :, 2].amin(1) > NEAR
    screen = corners[:, :, :2] / corners[:, :, 2:].clamp(min=NEAR) * focal
    left, top = (screen.amin(1) + torch.tensor([width / 2, height / 2], device=device) - 0.5).floor().unbind(1)
    right, bottom = (screen.amax(1) + torch.tensor([width / 2, height / 2], device=device) + 0.5).ceil().unbind(1)
    left, right = left.clamp(0, width).long(), right.clamp(0, width).long()
    top, bottom = top.clamp(0, height).long(), bottom.clamp(0, height).long()
    across = right - left
    counts = torch.where(ahead, across * (bottom - top), 0)

    part = torch.repeat_interleave(
        torch.arange(len(counts), device=device), counts
    )  # [M] one entry per pixel in a box
    within = torch.arange(len(part), device=device) - (counts.cumsum(0) - counts)[part]
    box_row = within // across[part]
    column, row = left[part] + within - box_row * across[part], top[part] + box_row
    pixel = parts.view[part] * num_pixels + row * width + column
    u, v = (column + 0.5 - width / 2) / focal, (row + 0.5 - height / 2) / focal
    jitter = torch.tensor(SUBSAMPLES, device=device).T[:, :, None] / focal  # [2, 4, 1]

    # World → the solid's own space: turn by -heading, divide by the half sizes.
    into = turn / parts.half[:, :, None]
    eyes = -(rotation.transpose(1, 2) @ shift[:, :, None])[:, :, 0]
    origin = (into @ (eyes - parts.centre)[:, :, None])[:, :, 0].T.contiguous()  # [3, Q]
    lens = (into @ rotation.transpose(1, 2)).permute(2, 1, 0).contiguous()  # [3 camera, 3 own, Q]

    hits = []
    starts = torch.searchsorted(parts.kind[part], torch.arange(len(KINDS) + 1, device=device)).tolist()
    for name, begin, end in zip(KINDS, starts, starts[1:], strict=False):
        mine = part[begin:end]
        from_ = origin[:, None, mine]  # [3, 1, m]
        along_u, along_v, along_axis = lens[:, :, None, mine]  # each [3, 1, m]
        towards = along_axis + along_u * (u[begin:end] + jitter[0]) + along_v * (v[begin:end] + jitter[1])
        reach, normal = solids.INTERSECT[name](from_, towards)
        hits.append((reach, normal, from_ + reach.nan_to_num(posinf=0.0) * towards))
    distance = torch.cat([reach for reach, _, _ in hits], 1).view(-1)
    sample = (pixel * len(SUBSAMPLES) + torch.arange(len(SUBSAMPLES), device=device)[:, None]).view(-1)

    nearest = depth.reshape(-1, 1).repeat(1, len(SUBSAMPLES)).view(-1)
    nearest.scatter_reduce_(0, sample, distance, "amin")
    visible = (distance <= nearest[sample]).logical_and_(distance.isfinite()).nonzero()[:, 0]
    normal = torch.cat([normal for _, normal, _ in hits], 2).view(3, -1)[:, visible]
    point = torch.cat([point for _, _, point in hits], 2).view(3, -1)[:, visible]
    pixel, part, distance = pixel[visible % len(part)], part[visible % len(part)], distance[visible]
    rgb = shade_points(parts, part, point, normal, turn, suns, clips)
    away = (distance - 14).clamp(min=0) / 30
    horizon = torch.tensor([scenery.SCENERY[clip.scene].horizon for clip in clips], device=device)
    frames_per_clip = num_views // len(clips)
    rgb = torch.lerp(rgb, horizon[parts.view[part] // frames_per_clip], away.clamp(0, 1)[:, None])

    share = 1 / len(SUBSAMPLES)
    covered = torch.zeros(num_views * num_pixels, device=device)
    covered.index_add_(0, pixel, torch.full_like(distance, share))
    colour = background.reshape(-1, 3) * (1 - covered)[:, None]
    colour.index_add_(0, pixel, rgb * share)
    masks = torch.zeros(MAX_SUBJECTS, num_views * num_pixels, device=device)
    for owner in range(MAX_SUBJECTS):
        belongs = (parts.owner[part] == owner).to(rgb.dtype) * share
        masks[owner].index_add_(0, pixel, belongs)
    depth = nearest.view(num_views, num_pixels, len(SUBSAMPLES)).amin(-1)
    return colour.clamp_(0, 1), masks.clamp_(0, 1), depth


def shade_points(
    parts: Parts, part: Tensor, point: Tensor, normal: Tensor, turn: Tensor, suns: Tensor, clips: list[Clip]
) -> Tensor:
    """Return the colour [M, 3] of surface points [3, M] (in the solids' own space) of parts [M]."""
    device = point.device
    colour = parts.colour[part].T
    paint = parts.paint[part]

    swap = (parts.kind[part] == KINDS.index("ring"))[None]
    angle = torch.atan2(torch.where(swap, point[1:2], point[2:3]), point[0:1])
    dark = (torch.floor(angle * (3 / math.pi)) % 2 == 0) & (paint == PAINTS.index("panels"))
    colour = torch.where(dark, colour * 0.78, colour)
    faces = (paint == PAINTS.index("face")).nonzero()[:, 0]
    if len(faces):
        owner = part[faces]
        painted = face.paint_face(point[:, faces], colour[:, faces], parts.accent[owner].T, parts.identity[owner].T)
        colour = colour.index_copy(1, faces, painted)

    # Normals go back to the world by the inverse transpose of world → own: divide by half sizes, turn by +heading.
    own = normal / parts.half[part].T
    matrix = turn.permute(1, 2, 0)[:, :, part]  # rows: world → own; its transpose turns back
    world = matrix[0] * own[0] + matrix[1] * own[1] + matrix[2] * own[2]
    world = world * (world * world).sum(0).clamp(min=1e-12).rsqrt()
    sun = suns[parts.view[part]].T
    looks = [scenery.SCENERY[clip.scene] for clip in clips]
    frames_per_clip = len(suns) // len(clips)
    clip_index = parts.view[part] // frames_per_clip
    ambient = torch.tensor([look.ambient for look in looks], device=device)[clip_index]
    diffuse = torch.tensor([look.diffuse for look in looks], device=device)[clip_index]
    tint = torch.tensor([look.sun for look in looks], device=device)[clip_index].T
    facing = (world * sun).sum(0).clamp(min=0)
    light = ambient * (0.82 + 0.3 * world[1]) + diffuse * facing * tint
    gloss = 0.22 * diffuse * facing.pow(24) * (parts.owner[part] >= 0)
    glowing = paint == PAINTS.index("glow")
    return torch.where(glowing, colour, colour * light + gloss).clamp(0, 1).T
