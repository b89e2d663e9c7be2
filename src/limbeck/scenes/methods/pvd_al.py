"""Progressive volume distillation with active learning: the student says where it still fails, and is shown more of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.method import Card, setting
from limbeck.rendering import Rendered
from limbeck.scenes.fields import Shot
from limbeck.scenes.methods.pvd import PVD, distance
from limbeck.zoo.fields import FieldOutput

LEVELS = ("image", "ray", "point")


def turned(poses: Tensor, angles: Tensor) -> Tensor:
    """Poses `(N, 3, 4)` whose rotation is R_z R_y R_x R, with angles `(N, 3)` around x, y, z in radians; their places stay."""
    c, s, one, zero = angles.cos(), angles.sin(), torch.ones(len(poses), device=poses.device), torch.zeros(len(poses), device=poses.device)

    def matrix(*entries: Tensor) -> Tensor:
        return torch.stack(entries, -1).view(-1, 3, 3)

    x = matrix(one, zero, zero, zero, c[:, 0], -s[:, 0], zero, s[:, 0], c[:, 0])
    y = matrix(c[:, 1], zero, s[:, 1], zero, one, zero, -s[:, 1], zero, c[:, 1])
    z = matrix(c[:, 2], -s[:, 2], zero, s[:, 2], c[:, 2], zero, zero, zero, one)
    return torch.cat([z @ y @ x @ poses[:, :, :3], poses[:, :, 3:]], -1)


@dataclass
class PVDAL(PVD):
    """`pvd` with three pools of what is hard, and a loss on depth in stage 3: + k_d ||depth_s - depth_t||_F.

    image: cameras whose rays were drawn worst in an epoch go to a pool; once it is full, some are taken out, turned by small random
    angles, and take the place of as many random cameras. ray: the share of rays with the largest sum over rgb |C_s - C_t| goes to a pool;
    once it is full, as many random ones of it come with every batch, and their slots are then overwritten by the step's hardest. point:
    feature, colour and log-density are compared only at points that matter in either rendering (weight above a threshold).
    """

    card = Card(
        id="pvd-al",
        title="Progressive Volume Distillation with Active Learning for Efficient NeRF Architecture Conversion",
        year=2023,
        wing="scenes",
        family="field",
        claim="10 to 20 times faster than training an MLP from scratch, with 0.8 to 2 dB higher PSNR.",
        equation="the losses of pvd + k_d |depth_s - depth_t|_F, on hard cameras, hard rays and points that matter",
        arxiv="2304.04012",
        baseline="pvd",
        certainty="verified-in-code",
        deviations=(
            "those of pvd; an epoch is a number of cameras (`epoch`), and a camera is judged by the rays that it gave, not by a whole "
            "picture; pools are smaller, in proportion to the run; pooled rays are rendered again by the teacher; rays and points are "
            "chosen in stage 3 alone, where both are rendered"
        ),
    )
    contract = {"cameras": 2, "epoch": 4, "image_pool": 2, "ray_pool": 4, "stages": [0.0, 0.0], "start_epoch": 0, "hard_images": 0.5}

    levels: tuple[str, ...] = setting(LEVELS, "which pools are used, any of image, ray, point", choices=None)
    hard_images: float = setting(0.1, "share of an epoch's cameras that count as hard (paper: 0.1)", above=0, at_most=1)
    image_pool: int = setting(20, "hard cameras that are kept (released code: 100)", at_least=1)
    angle: float = setting(math.pi / 20, "greatest turn around each axis, in radians (released code: pi/20)", at_least=0)
    epoch: int = setting(40, "cameras of an epoch (released code: 100)", at_least=1)
    start_epoch: int = setting(3, "epochs before the first camera is called hard (released code: 3)", at_least=0)
    hard_rays: float = setting(0.1, "share of a batch that counts as hard, and that is added to it (paper: 0.1)", above=0, at_most=1)
    ray_pool: int = setting(1024, "hard rays that are kept (released code: 614400, 150 batches)", at_least=1)
    k_depth: float = setting(0.002, "weight of the depths (working value: as the losses at points)", at_least=0)
    weight_above: float = setting(1e-4, "volume weight above which a point matters (released code: 1e-4)", at_least=0)

    def setup(self, problem: Any) -> None:
        super().setup(problem)
        for level in self.levels:
            if level not in LEVELS:
                raise UserError(f"{self.card.id}: levels holds {level!r}", f"choose among {', '.join(LEVELS)}")
        if self.epoch < self.cameras:
            raise UserError(f"{self.card.id}: an epoch of {self.epoch} cameras, and {self.cameras} a step", "set epoch to at least cameras")
        device = problem.device
        self.state.update(
            poses=torch.zeros(0, 3, 4, device=device),
            errors=torch.zeros(0, device=device),
            cursor=0,
            epochs=0,
            image_pool=torch.zeros(0, 3, 4, device=device),
            ray_pool=torch.zeros(0, 6, device=device),
            taken=torch.zeros(0, dtype=torch.long, device=device),
            replayed=0,
        )

    # ---- cameras ----

    def _next_poses(self) -> Tensor:
        """The cameras of a step; at an epoch's end the hardest are kept and new ones are drawn."""
        state = self.state
        if not len(state["poses"]) or state["cursor"] + self.cameras > len(state["poses"]):
            if len(state["poses"]):
                state["epochs"] += 1
            hard = self._hard_poses()
            state["poses"] = torch.cat([hard, self.problem.new_poses(self.epoch - len(hard))])
            order = torch.randperm(self.epoch, device=hard.device)
            state["poses"] = state["poses"][order]
            state["errors"], state["cursor"] = torch.zeros(self.epoch, device=hard.device), 0
        first = state["cursor"]
        state["cursor"] = first + self.cameras
        return state["poses"][first : first + self.cameras]

    def _hard_poses(self) -> Tensor:
        """Some of the pool, turned; their slots take the worst cameras of the epoch that ends."""
        state = self.state
        none = state["poses"][:0]
        if "image" not in self.levels or not len(state["poses"]) or state["epochs"] <= self.start_epoch:
            return none
        count = max(1, round(self.hard_images * self.epoch))
        worst = state["poses"][state["errors"].argsort(descending=True)[:count]]
        pool = state["image_pool"]
        if len(pool) < self.image_pool:
            state["image_pool"] = torch.cat([pool, worst])
            return none
        slots = torch.randperm(len(pool), device=pool.device)[:count]
        angles = self.angle * (2 * torch.rand(len(slots), 3, device=pool.device) - 1)
        drawn = turned(pool[slots], angles)
        state["image_pool"] = pool.index_copy(0, slots, worst[: len(slots)])
        state["replayed"] += len(slots)
        return drawn

    # ---- rays ----

    def rays(self, clock: Clock) -> Shot:
        """Rays of the step's cameras, and hard ones of the pool with backgrounds of their own."""
        problem, pool = self.problem, self.state["ray_pool"]
        shot = problem.shot(*problem.rays_from(self._next_poses(), problem.training.batch))
        self.state["taken"] = self.state["taken"][:0]
        if "ray" not in self.levels or len(pool) < self.ray_pool or self.stage(clock) < 3:
            return shot
        count = max(1, round(self.hard_rays * problem.training.batch))
        slots = torch.randperm(len(pool), device=pool.device)[:count]
        self.state["taken"] = slots
        return shot.joined(problem.shot(pool[slots, :3], pool[slots, 3:]))

    def deeper(self, shot: Shot, seen: Rendered, truth: Rendered) -> dict[str, Tensor]:
        """The loss on depth; and the step's errors are noted."""
        with torch.no_grad():
            regular = self.problem.training.batch
            errors = (seen.colour - truth.colour).abs().sum(-1)[:regular]
            self._note_cameras(errors)
            if "ray" in self.levels:
                self._note_rays(shot, errors)
        return {"depth": self.k_depth * distance(seen.depth - truth.depth, self.distance)}

    def _note_cameras(self, errors: Tensor) -> None:
        first = self.state["cursor"] - self.cameras
        camera = torch.arange(len(errors), device=errors.device) % self.cameras
        total = torch.zeros(self.cameras, device=errors.device).index_add(0, camera, errors)
        self.state["errors"][first : first + self.cameras] = total / torch.bincount(camera, minlength=self.cameras).clamp_min(1)

    def _note_rays(self, shot: Shot, errors: Tensor) -> None:
        """The hardest regular rays go to the pool, or, once it is full, into the slots that were drawn."""
        state = self.state
        hardest = errors.topk(max(1, round(self.hard_rays * len(errors)))).indices
        rays = torch.cat([shot.origins[hardest], shot.directions[hardest]], -1)
        slots = state["taken"]
        if len(slots):
            state["ray_pool"] = state["ray_pool"].index_copy(0, slots[: len(rays)], rays[: len(slots)])
        elif len(state["ray_pool"]) < self.ray_pool:
            state["ray_pool"] = torch.cat([state["ray_pool"], rays])[: self.ray_pool]

    # ---- points ----

    def points(self, shot: Shot, aim: FieldOutput, truth: Rendered, seen: Rendered | None) -> tuple[Tensor, Tensor | None]:
        """Points that matter in either rendering."""
        if "point" not in self.levels or seen is None:
            return super().points(shot, aim, truth, seen)
        matters = (truth.weights > self.weight_above) | (seen.weights.detach() > self.weight_above)
        pick = shot.chosen(matters.flatten()).nonzero()[:, 0]
        return pick, pick
