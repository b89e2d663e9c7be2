"""Problems of the kind "field": a teacher field, a student field, posed views; and what conversions share: cameras, rays, points."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.evaluation.pictures import picture_quality
from limbeck.rendering import Rendered, Views, composite, cube_bounds, depths_along, look_at, render_views
from limbeck.rendering.views import ViewSet
from limbeck.scenes.scene_method import Problem, SceneMethod
from limbeck.zoo.fields import FieldOutput

EMPTY = -30.0
"""Log-density where there is nothing."""

EPS = 1e-15
"""Of Adam, as Instant-NGP has it: table entries that are read rarely get tiny gradients."""


@dataclass
class Shot:
    """R rays with S points on each, the same for every field that is asked.

    Attributes:
        origins, directions: `(R, 3)`.
        depths, lengths: `(R, S)`, see `limbeck.rendering.depths_along`.
        background: `(R, 3)` behind each ray.
        kept: `(P,)` numbers of the points that fields are asked about; None for all. The others count as empty.
    """

    origins: Tensor
    directions: Tensor
    depths: Tensor
    lengths: Tensor
    background: Tensor
    kept: Tensor | None = None

    @property
    def everywhere(self) -> Tensor:
        """`(R S, 3)` all points."""
        return (self.origins[:, None] + self.depths[..., None] * self.directions[:, None]).reshape(-1, 3)

    @property
    def places(self) -> Tensor:
        """`(P, 3)` the points that are asked about."""
        return self.chosen(self.everywhere)

    @property
    def views(self) -> Tensor:
        """`(P, 3)` the direction in which each of them is seen."""
        return self.chosen(self.directions[:, None].expand(*self.depths.shape, 3).reshape(-1, 3))

    def chosen(self, values: Tensor) -> Tensor:
        """Those of `(R S, ...)` that belong to points that are asked about."""
        return values if self.kept is None else values[self.kept]

    def composed(self, found: FieldOutput) -> Rendered:
        """What the rays see of a field that said `found` of the points."""
        assert found.colour is not None
        shape, kind = self.depths.shape, self.depths.dtype  # networks may have run in a half-precision type
        log_density, colour = found.log_density.to(kind), found.colour.to(kind)
        if self.kept is not None:
            log_density = torch.full((shape.numel(),), EMPTY, device=colour.device).index_put((self.kept,), log_density)
            colour = torch.zeros(shape.numel(), 3, device=colour.device).index_put((self.kept,), colour)
        return composite(log_density.view(shape), colour.view(*shape, 3), self.depths, self.lengths, self.background)

    def joined(self, other: Shot) -> Shot:
        """The rays of both; every point of them is asked about."""
        names = ("origins", "directions", "depths", "lengths", "background")
        return Shot(*(torch.cat([getattr(self, name), getattr(other, name)]) for name in names))


@torch.no_grad()
def occupancy(network: Any, bound: float, cells: int, above: float, fine: int = 2) -> Tensor:
    """`(cells, cells, cells)` bool, indexed x, y, z: where a field has something, widened by one cell.

    Each cell is looked at in `fine`^3 places; it is occupied where the log-density of one of them is greater than `above`.
    """
    device = next(network.parameters()).device
    line = ((torch.arange(cells * fine, device=device) + 0.5) / (cells * fine) * 2 - 1) * bound
    found = []
    for x in line.split(fine):  # a slab of cells at a time
        places = torch.stack(torch.meshgrid(x, line, line, indexing="ij"), -1).reshape(-1, 3)
        dense = network.geometry(places).log_density.view(1, 1, fine, cells * fine, cells * fine)
        found.append(nn.functional.max_pool3d(dense, fine)[0])
    dense = (torch.cat(found, 1)[None] > above).float()
    return nn.functional.max_pool3d(dense, 3, stride=1, padding=1)[0, 0].bool()


def inside_of(grid: Tensor, places: Tensor, bound: float) -> Tensor:
    """`(P,)` whether places `(P, 3)` lie in occupied cells."""
    cell = ((places / bound + 1) / 2 * len(grid)).long().clamp(0, len(grid) - 1)
    return grid[cell[:, 0], cell[:, 1], cell[:, 2]]


@dataclass
class FieldProblem(Problem):
    """A conversion of fields. Teacher and student are `limbeck.zoo.fields.Field`s, or modules that answer like one.

    Attributes:
        views: the scene's posed pictures, on `device`.
        held: those by which students are judged: the test part, or the validation part.
        start: the student before the first step, from which rivals begin; None where there are none.
    """

    views: ViewSet = field(kw_only=True)
    held: Views = field(kw_only=True)
    start: nn.Module | None = field(default=None, kw_only=True)

    @property
    def bound(self) -> float:
        """Half the side of the cube that is rendered."""
        return self.views.bound

    def behind(self, count: int) -> Tensor:
        """`(count, 3)` background colours: random ones from torch's global generator, or the recipe's."""
        kind = self.spec.background
        if kind == "random":
            return torch.rand(count, 3, device=self.device)
        return torch.full((count, 3), float(kind == "white"), device=self.device)

    def shot(self, origins: Tensor, directions: Tensor, background: Tensor | None = None) -> Shot:
        """Points on rays, at random places from torch's global generator."""
        near, far = cube_bounds(origins, directions, self.bound)
        depths, lengths = depths_along(near, far, self.spec.points, jitter=True)
        return Shot(origins, directions, depths, lengths, self.behind(len(origins)) if background is None else background)

    def new_poses(self, count: int) -> Tensor:
        """`(count, 3, 4)` poses where no picture was taken, from torch's global generator.

        Around a scene: on the sphere shell, between the elevations, and turned to the middle as the training cameras are. Else: in the
        box of their places, turned as one of them.
        """
        cameras = self.views.train.cameras
        places = cameras.places
        if not self.views.around:
            low, high = places.amin(0), places.amax(0)
            here = low + (high - low) * torch.rand(count, 3, device=self.device)
            like = torch.randint(len(places), (count,), device=self.device)
            return torch.cat([cameras.poses[like, :, :3], here[:, :, None]], -1)
        radius = places.norm(dim=-1)
        height = places[:, 2] / radius
        draw = torch.rand(3, count, device=self.device)
        z = height.min() + (height.max() - height.min()) * draw[0]
        far = radius.min() + (radius.max() - radius.min()) * draw[1]
        turn, flat = 2 * torch.pi * draw[2], (1 - z**2).clamp_min(0).sqrt()
        return look_at(far[:, None] * torch.stack([flat * turn.cos(), flat * turn.sin(), z], -1))

    def rays_from(self, poses: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`count` rays through random pixels, as many from each of some poses `(M, 3, 4)`; origins and directions."""
        cameras = self.views.train.cameras.with_poses(poses)
        return cameras.random_rays(torch.arange(count, device=self.device) % len(poses))

    def pictures(self, network: nn.Module, views: Views) -> Tensor:
        """`(N, 3, H, W)` what a field shows from the cameras of some views, over white (black where the recipe says so)."""
        network.eval()
        return render_views(network, views.cameras, self.bound, self.spec.points, self.plain)[0]

    @property
    def plain(self) -> Tensor:
        """`(3,)` the background of pictures that are measured: white, unless the recipe's is black."""
        return torch.full((3,), float(self.spec.background != "black"), device=self.device)

    def quality(self, network: nn.Module, views: Views | None = None) -> dict[str, float]:
        """PSNR and SSIM on held-out views."""
        views = self.held if views is None else views
        return picture_quality(self.pictures(network, views), views.over(self.plain))

    def watch(self, student: nn.Module) -> dict[str, float]:
        """PSNR on the held-out views, for the curve; no choice is made by it."""
        return {"psnr": self.quality(student)["psnr"]}


@dataclass
class FieldMethod(SceneMethod):
    """What methods on fields share: optimiser groups, and the mean density penalty of students that have one."""

    def groups(self, problem: Any) -> list[Any]:
        """The student's parameters with Adam's epsilon of Instant-NGP; values at places at the field's own multiple of the rate."""
        student = problem.student
        tables = {id(p) for p in getattr(student, "tables", list)()}
        rate = problem.training.lr * getattr(student, "table_rate", 1.0)
        learned = [p for p in student.parameters() if p.requires_grad]
        placed, rest = [p for p in learned if id(p) in tables], [p for p in learned if id(p) not in tables]
        eps = {} if problem.training.optimizer == "sgd" else {"eps": EPS}
        return [{"params": group, "lr": lr, **eps} for group, lr in ((rest, problem.training.lr), (placed, rate)) if group]

    def sparse(self, weight: float) -> dict[str, Tensor]:
        """The term `sparse`: the student's density factors, where it has any."""
        penalty = getattr(self.problem.student, "penalty", lambda: None)()
        return {} if penalty is None or not weight else {"sparse": weight * penalty}


def check_field(network: nn.Module, bound: float, name: str) -> None:
    """Refuse what is no field, and fields made for another cube.

    Raises:
        UserError: naming the role.
    """
    for needed in ("geometry", "shade"):
        if not hasattr(network, needed):
            raise UserError(
                f"{name} is a {type(network).__name__}, no radiance field",
                "name field-mlp, field-hash, field-vm or field-voxels, or a folder with a saved one",
            )
    own = getattr(network, "bound", bound)
    if own < bound:
        raise UserError(f"{name}: made for a cube of half side {own:g}, and the scene needs {bound:g}", f"set args.bound={bound:g}")
