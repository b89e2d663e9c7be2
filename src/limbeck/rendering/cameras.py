"""Pinhole cameras: from pixels to rays and back.

A pose is camera to world, `(3, 4)`: columns x (right), y (up), z (backward: the camera looks along -z), and the place; as in the files of
NeRF and Blender. Pixel (column u, row v) has its centre at (u + 0.5, v + 0.5); rows go down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.errors import UserError


@dataclass
class Cameras:
    """Some cameras of one picture size.

    Attributes:
        poses: `(N, 3, 4)` float32, camera to world.
        focal: `(N, 2)` focal lengths in pixels, along u and v.
        centre: `(N, 2)` principal points in pixels.
        height, width: of their pictures, in pixels.
    """

    poses: Tensor
    focal: Tensor
    centre: Tensor
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.poses.ndim != 3 or self.poses.shape[1:] != (3, 4):
            raise UserError(f"camera poses have shape {tuple(self.poses.shape)}", "give (N, 3, 4) matrices, camera to world")

    def __len__(self) -> int:
        return len(self.poses)

    def to(self, device: torch.device | str) -> Cameras:
        """The same cameras on a device."""
        return Cameras(self.poses.to(device), self.focal.to(device), self.centre.to(device), self.height, self.width)

    def subset(self, pick: Tensor) -> Cameras:
        """The cameras `pick` `(M,)`."""
        return Cameras(self.poses[pick], self.focal[pick], self.centre[pick], self.height, self.width)

    def with_poses(self, poses: Tensor) -> Cameras:
        """The same lens as the first camera at other places: poses `(M, 3, 4)`."""
        count = len(poses)
        return Cameras(poses, self.focal[:1].expand(count, 2), self.centre[:1].expand(count, 2), self.height, self.width)

    @property
    def places(self) -> Tensor:
        """`(N, 3)` where they stand."""
        return self.poses[:, :, 3]

    def rays(self, camera: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Origins and unit directions `(R, 3)` of rays through points of the picture planes.

        Args:
            camera: `(R,)` int64. u, v: `(R,)` in pixels; the centre of the first pixel is (0.5, 0.5).
        """
        focal, centre, pose = self.focal[camera], self.centre[camera], self.poses[camera]
        local = torch.stack([(u - centre[:, 0]) / focal[:, 0], -(v - centre[:, 1]) / focal[:, 1], -torch.ones_like(u)], -1)
        return pose[:, :, 3], F.normalize(torch.einsum("rij,rj->ri", pose[:, :, :3], local), dim=-1)

    def all_rays(self, number: int, fine: int = 1) -> tuple[Tensor, Tensor]:
        """Rays of every pixel of one camera, row by row, `(H W fine^2, 3)`: `fine` x `fine` in each pixel, those of a pixel together."""
        device = self.poses.device
        step = (torch.arange(fine, device=device) + 0.5) / fine
        rows = torch.arange(self.height, device=device, dtype=step.dtype)
        columns = torch.arange(self.width, device=device, dtype=step.dtype)
        v, u, b, a = torch.meshgrid(rows, columns, step, step, indexing="ij")
        camera = torch.full((u.numel(),), number, dtype=torch.long, device=device)
        return self.rays(camera, (u + a).reshape(-1), (v + b).reshape(-1))

    def random_rays(self, camera: Tensor) -> tuple[Tensor, Tensor]:
        """Rays through the centres of random pixels, from torch's global generator.

        Args:
            camera: `(R,)` int64, one for each ray.
        """
        device = self.poses.device
        u = torch.randint(self.width, camera.shape, device=device) + 0.5
        v = torch.randint(self.height, camera.shape, device=device) + 0.5
        return self.rays(camera, u, v)

    def project(self, camera: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where points `(R, 3)` fall: u, v in pixels, and the distance in front of the camera (negative behind it)."""
        pose = self.poses[camera]
        local = torch.einsum("rji,rj->ri", pose[:, :, :3], points - pose[:, :, 3])
        ahead = -local[:, 2]
        u = self.focal[camera, 0] * local[:, 0] / ahead + self.centre[camera, 0]
        v = -self.focal[camera, 1] * local[:, 1] / ahead + self.centre[camera, 1]
        return u, v, ahead


def look_at(places: Tensor, target: Tensor | None = None) -> Tensor:
    """Poses `(N, 3, 4)` of upright cameras (z is up) at `places` `(N, 3)` that look at `target` `(3,)`, the origin if left out."""
    back = F.normalize(places if target is None else places - target, dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0], device=places.device).expand_as(back)
    steep = back[:, 2:].abs() > 0.999  # straight from above there is no upright: take y
    up = torch.where(steep, torch.tensor([0.0, 1.0, 0.0], device=places.device), up)
    right = F.normalize(torch.linalg.cross(up, back), dim=-1)
    return torch.stack([right, torch.linalg.cross(back, right), back, places], -1)


def orbit(
    count: int,
    size: int,
    radius: tuple[float, float] = (3.0, 3.0),
    elevation: tuple[float, float] = (-20.0, 60.0),
    angle: float = 40.0,
    generator: torch.Generator | None = None,
) -> Cameras:
    """Random cameras around the origin that look at it.

    Args:
        size: side of the pictures in pixels.
        radius: least and greatest distance. elevation: least and greatest, in degrees, uniform in area.
        angle: of view, in degrees.
        generator: None for torch's global one.
    """
    turn, height, far = torch.rand(3, count, generator=generator)
    low, high = (math.sin(math.radians(e)) for e in elevation)
    z = low + (high - low) * height
    flat, turn = (1 - z**2).clamp_min(0).sqrt(), 2 * math.pi * turn
    distance = radius[0] + (radius[1] - radius[0]) * far
    places = torch.stack([flat * turn.cos(), flat * turn.sin(), z], -1) * distance[:, None]
    focal = 0.5 * size / math.tan(math.radians(angle) / 2)
    return Cameras(look_at(places), torch.full((count, 2), focal), torch.full((count, 2), size / 2), size, size)
