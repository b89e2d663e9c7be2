"""Simple solids whose pictures are known exactly: a ray meets a sphere, a box or an extruded letter at a point that a formula gives.

Surfaces carry photographs. Shapes: R rays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.errors import UserError

LIGHT = F.normalize(torch.tensor([0.4, -0.5, 0.8]), dim=0)
"""Where the one distant light stands."""


@dataclass
class Hit:
    """Where rays meet a surface: distance `(R,)` (infinite for a miss), unit normal `(R, 3)`, place on the picture `(R, 2)` in [0, 1]."""

    distance: Tensor
    normal: Tensor
    place: Tensor


@dataclass
class Solid:
    """A body in the world.

    Attributes:
        picture: `(3, h, w)` in [0, 1], glued to its surface; None for `colour`.
        colour: of a plain surface.
        middle: `(3,)`. turn: degrees around z, then around its own x.
        gloss: strength of the highlight, which depends on the direction of view.
    """

    picture: Tensor | None = None
    colour: tuple[float, float, float] = (0.8, 0.8, 0.8)
    middle: tuple[float, float, float] = (0.0, 0.0, 0.0)
    turn: tuple[float, float] = (0.0, 0.0)
    gloss: float = 0.0

    def axes(self) -> Tensor:
        """`(3, 3)`: its own axes as columns."""
        a, b = math.radians(self.turn[0]), math.radians(self.turn[1])
        around_z = torch.tensor([[math.cos(a), -math.sin(a), 0.0], [math.sin(a), math.cos(a), 0.0], [0.0, 0.0, 1.0]])
        around_x = torch.tensor([[1.0, 0.0, 0.0], [0.0, math.cos(b), -math.sin(b)], [0.0, math.sin(b), math.cos(b)]])
        return around_z @ around_x

    def hit(self, origins: Tensor, directions: Tensor) -> Hit:
        """The first meeting in front of the rays' origins."""
        axes = self.axes()
        found = self.local_hit((origins - torch.tensor(self.middle)) @ axes, directions @ axes)
        return Hit(found.distance, found.normal @ axes.T, found.place)

    def local_hit(self, origins: Tensor, directions: Tensor) -> Hit:
        """The same in its own coordinates, centred."""
        raise NotImplementedError

    def shaded(self, hit: Hit, directions: Tensor) -> Tensor:
        """`(R, 3)` colours in [0, 1] of the points that were met."""
        if self.picture is None:
            own = torch.tensor(self.colour).expand(len(directions), 3)
        else:
            grid = (2 * hit.place.clamp(0, 1) - 1)[None, :, None]
            own = F.grid_sample(self.picture[None], grid, align_corners=False, padding_mode="border")[0, :, :, 0].T
        lit = 0.5 + 0.5 * (hit.normal @ LIGHT).clamp_min(0)
        half = F.normalize(LIGHT - directions, dim=-1)
        shine = self.gloss * (hit.normal * half).sum(-1).clamp_min(0) ** 16
        return (own * lit[:, None] + shine[:, None]).clamp(0, 1)


@dataclass
class Sphere(Solid):
    """A ball; its picture goes round it once."""

    radius: float = 0.5

    def local_hit(self, origins: Tensor, directions: Tensor) -> Hit:
        b = (origins * directions).sum(-1)
        root = b**2 - (origins.square().sum(-1) - self.radius**2)
        near = -b - root.clamp_min(0).sqrt()
        distance = torch.where((root >= 0) & (near > 0), near, torch.inf)
        normal = F.normalize(origins + near[:, None] * directions, dim=-1)
        u = torch.atan2(normal[:, 1], normal[:, 0]) / (2 * math.pi) + 0.5
        v = torch.acos(normal[:, 2].clamp(-1, 1)) / math.pi
        return Hit(distance, normal, torch.stack([u, v], -1))


@dataclass
class Box(Solid):
    """A cuboid of half sides `half`; its picture lies on each side."""

    half: tuple[float, float, float] = (0.4, 0.4, 0.4)

    def local_hit(self, origins: Tensor, directions: Tensor) -> Hit:
        half = torch.tensor(self.half)
        safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
        a, b = (-half - origins) / safe, (half - origins) / safe
        entries = torch.minimum(a, b)
        near, side = entries.max(-1)
        distance = torch.where((near <= torch.maximum(a, b).amin(-1)) & (near > 0), near, torch.inf)
        normal = -F.one_hot(side, 3) * safe.sign()
        point = (origins + near[:, None] * directions) / (2 * half) + 0.5
        others = torch.tensor([[1, 2], [0, 2], [0, 1]])[side]
        place = point.gather(-1, others)
        return Hit(distance, normal, torch.stack([place[:, 0], 1 - place[:, 1]], -1))


@dataclass
class Letter(Solid):
    """Closed outlines in the x-z plane, extruded by `thick` to both sides along y; its picture lies on front and back.

    Attributes:
        outlines: `(K, 2)` polygons; what an odd number of them encloses is solid.
    """

    outlines: Sequence[Tensor] = field(default_factory=list)
    thick: float = 0.2

    def edges(self) -> tuple[Tensor, Tensor]:
        """Beginnings and ends of all edges, `(E, 2)` each."""
        return torch.cat(list(self.outlines)), torch.cat([outline.roll(-1, 0) for outline in self.outlines])

    def inside(self, points: Tensor) -> Tensor:
        """`(R,)` whether points `(R, 2)` are enclosed, by counting the edges to their right."""
        a, b = self.edges()
        x, y = points[:, :1], points[:, 1:]
        crosses = (a[:, 1] > y) != (b[:, 1] > y)
        rise = torch.where(b[:, 1] == a[:, 1], torch.ones_like(a[:, 1]), b[:, 1] - a[:, 1])
        at = a[:, 0] + (y - a[:, 1]) / rise * (b[:, 0] - a[:, 0])
        return (crosses & (x < at)).sum(-1) % 2 == 1

    def local_hit(self, origins: Tensor, directions: Tensor) -> Hit:
        best = torch.full((len(origins),), torch.inf)
        normal = torch.zeros_like(origins)
        deep = torch.where(directions[:, 1].abs() < 1e-9, torch.full_like(directions[:, 1], 1e-9), directions[:, 1])
        for side in (-1.0, 1.0):
            distance = (side * self.thick - origins[:, 1]) / deep
            point = origins + distance[:, None] * directions
            met = (distance > 0) & (distance < best) & (deep * side < 0) & self.inside(point[:, [0, 2]])
            best = torch.where(met, distance, best)
            normal = torch.where(met[:, None], torch.tensor([0.0, side, 0.0]), normal)
        wall, outward = self._walls(origins, directions)
        met = wall < best
        best, normal = torch.where(met, wall, best), torch.where(met[:, None], outward, normal)
        point = (origins + torch.where(best.isfinite(), best, 0.0)[:, None] * directions)[:, [0, 2]]
        every = torch.cat(list(self.outlines))
        low, high = every.amin(0), every.amax(0)
        place = (point - low) / (high - low)
        return Hit(best, normal, torch.stack([place[:, 0], 1 - place[:, 1]], -1))

    def _walls(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Distance and normal of the first side wall that each ray meets."""
        a, b = self.edges()
        along = b - a
        across = torch.stack([along[:, 1], -along[:, 0]], -1)  # perpendicular to each edge
        o, d = origins[:, [0, 2]], directions[:, [0, 2]]
        speed = d @ across.T
        speed = torch.where(speed.abs() < 1e-12, torch.full_like(speed, 1e-12), speed)
        distance = ((a * across).sum(-1) - o @ across.T) / speed
        point = o[:, None] + distance[..., None] * d[:, None]
        share = ((point - a) * along).sum(-1) / along.square().sum(-1).clamp_min(1e-12)
        depth = origins[:, 1:2] + distance * directions[:, 1:2]
        met = (distance > 1e-6) & (share >= 0) & (share <= 1) & (depth.abs() <= self.thick)
        nearest, which = torch.where(met, distance, torch.inf).min(-1)
        flat = F.normalize(across, dim=-1)[which]
        flat = -flat * (flat * d).sum(-1, keepdim=True).sign()  # towards the ray
        return nearest, torch.stack([flat[:, 0], torch.zeros_like(nearest), flat[:, 1]], -1)


def trace(solids: Sequence[Solid], origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What rays see of some solids: colour `(R, 3)` (black for a miss), whether they hit `(R,)` in {0, 1}, distance `(R,)`."""
    colour = torch.zeros_like(origins)
    nearest = torch.full((len(origins),), torch.inf)
    for solid in solids:
        found = solid.hit(origins, directions)
        met = found.distance < nearest
        colour = torch.where(met[:, None], solid.shaded(found, directions), colour)
        nearest = torch.where(met, found.distance, nearest)
    return colour, nearest.isfinite().float(), nearest


def photograph(name: str) -> Tensor:
    """One of scikit-learn's sample photographs as `(3, h, w)` in [0, 1]: "china.jpg" or "flower.jpg"."""
    from sklearn.datasets import load_sample_image

    return torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1).float() / 255


def letter_outlines(text: str, height: float = 1.4) -> list[Tensor]:
    """Outlines of a text in DejaVu Sans Bold (of matplotlib), centred, so many units high or wide, whichever is more.

    Raises:
        UserError: nothing is drawn for it.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    polygons = TextPath((0, 0), text, size=1, prop=FontProperties(family="DejaVu Sans", weight="bold")).to_polygons(closed_only=True)
    outlines = [torch.tensor(polygon[:-1].copy(), dtype=torch.float32) for polygon in polygons if len(polygon) > 3]
    if not outlines:
        raise UserError(f"the font draws nothing for {text!r}", "give a letter, a digit or a common sign")
    every = torch.cat(outlines)
    low, high = every.amin(0), every.amax(0)
    scale = height / float((high - low).max())
    return [(outline - (low + high) / 2) * scale for outline in outlines]
