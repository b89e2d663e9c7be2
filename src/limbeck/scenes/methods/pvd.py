"""Progressive volume distillation: any radiance field into any other, from shallow losses to deep ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.method import Card, setting
from limbeck.rendering import Rendered, clamp_inward
from limbeck.scenes.fields import FieldMethod, Shot, inside_of, occupancy
from limbeck.zoo.fields import FieldOutput


def distance(difference: Tensor, kind: str = "norm") -> Tensor:
    """The size of a difference: over the whole batch, not its mean ("norm": Frobenius; "l1": sum of sizes), or a mean ("mse"; "smooth-l1"
    with beta 0.05). Nothing is 0 apart."""
    if not difference.numel():
        return difference.sum()
    if kind == "norm":
        return torch.linalg.vector_norm(difference)
    if kind == "l1":
        return difference.abs().sum()
    if kind == "mse":
        return difference.square().mean()
    return nn.functional.smooth_l1_loss(difference, torch.zeros_like(difference), beta=0.05)


@dataclass
class PVD(FieldMethod):
    """Student and teacher are asked at the same points of the rays of random cameras; s is log-density, F = [s, feature], dist Frobenius.

    Stage 1: L = k_f dist(F_s, F_t), the first block alone. Stage 2: + k_c dist(c_s, c_t) + k_s dist(s_s, s_t). Stage 3: + dist(C_s, C_t) of
    the rendered pixels. k_f shrinks by `feature_decay` a step. Where either field has no feature (voxels), stage 1 and the feature terms
    are left out.
    """

    card = Card(
        id="pvd",
        title="One is All: Bridging the Gap Between Neural Radiance Fields Architectures with Progressive Volume Distillation",
        year=2022,
        wing="scenes",
        family="field",
        claim="An MLP is distilled from a hash-table model 10 to 20 times faster than it is trained from scratch, at superior quality.",
        equation="L = |C_s - C_t|_F + k_f |F_s - F_t|_F + k_c |c_s - c_t|_F + k_s |s_s - s_t|_F, in three stages",
        arxiv="2211.15977",
        baseline="from-images",
        certainty="verified-in-code",
        deviations=(
            "stages are shares of the run instead of 2000 and 5000 of 30000 steps; the occupancy grid is the teacher's, made once, and the "
            "student is rendered without one, so that it is told of empty space by log-densities at some of the points there; log-density "
            "is rendered in [-7, 7] and compared in [-5, 7] instead of [-2, 7] for both, with a gradient that leads back; feature and "
            "colour are compared where the teacher takes some of the light; several cameras a step; the recipe's schedule"
        ),
    )
    contract = {"cameras": 2}

    s_clip: tuple[float, float] = setting((-5.0, 7.0), "range in which log-densities are compared (released code: -2 to 7)")
    there_above: float = setting(
        0.01, "features and colours are compared where a point's interval takes more of the light than this", at_least=0, at_most=1
    )
    cells: int = setting(32, "along each side of the teacher's occupancy grid (released code: 128); 0 for none", at_least=0)
    occupied_above: float = setting(-2.0, "log-density above which a cell is occupied")
    empty_share: float = setting(0.1, "of the points in empty cells, at which the student learns that there is nothing", above=0, at_most=1)
    k_feature: float = setting(0.002, "weight of the first block's output (paper: 0.002)", at_least=0)
    k_color: float = setting(0.002, "weight of the points' colours (paper: 0.002)", at_least=0)
    k_sigma: float = setting(0.002, "weight of the points' log-densities (paper: 0.002)", at_least=0)
    feature_decay: float = setting(0.995, "of k_feature, a step (released code: 0.995)", above=0, at_most=1)
    stages: tuple[float, float] = setting((1 / 15, 1 / 6), "shares of the run at which stages 1 and 2 end", at_least=0, at_most=1)
    distance: str = setting("norm", "of the losses", choices=("norm", "l1", "mse", "smooth-l1"))
    sparse_weight: float = setting(1e-4, "of a VM student's density factors, in stage 3 (released code: 1e-4)", at_least=0)
    cameras: int = setting(4, "new ones a step (released code: 1, with 4096 rays)", at_least=1)
    copy_head: bool = setting(False, "take the teacher's second block and leave it as it is (both must have the same)")

    def setup(self, problem: Any) -> None:
        if self.stages[0] > self.stages[1]:
            raise UserError(f"{self.card.id}: stages {list(self.stages)} run backwards", "give [end of stage 1, end of stage 2]")
        if self.s_clip[0] >= self.s_clip[1]:
            raise UserError(f"{self.card.id}: s_clip {list(self.s_clip)} is empty", "give [low, high] with low < high")
        self.features = all(getattr(network, "has_feature", True) for network in (problem.teacher, problem.student))
        if self.copy_head:
            self._take_head(problem)
        self._occupied = occupancy(problem.teacher, problem.bound, self.cells, self.occupied_above) if self.cells else None
        if self._occupied is not None and not bool(self._occupied.any()):
            raise UserError(
                f"{self.card.id}: the teacher has nothing in its whole cube (log-density above {self.occupied_above:g} nowhere)",
                "train it longer, lower occupied_above, or set cells=0",
            )

    def _take_head(self, problem: Any) -> None:
        try:
            problem.student.colour_head.load_state_dict(problem.teacher.colour_head.state_dict())
        except (AttributeError, RuntimeError):
            raise UserError(
                f"{self.card.id}: copy_head needs two fields with the same second block", "give both the same args.head, or leave it out"
            ) from None
        problem.student.colour_head.requires_grad_(False)

    def stage(self, clock: Clock) -> int:
        """1, 2 or 3."""
        first, second = (round(share * clock.total) for share in self.stages)
        return 1 if clock.step < first and self.features else 2 if clock.step < second else 3

    def rays(self, clock: Clock) -> Shot:
        """The rays of a step."""
        problem = self.problem
        return problem.shot(*problem.rays_from(problem.new_poses(self.cameras), problem.training.batch))

    def thinned(self, shot: Shot) -> tuple[Shot, Tensor]:
        """The rays without the points where the teacher has nothing, and some of these points `(E, 3)`."""
        if self._occupied is None:
            return shot, shot.origins[:0]
        places = shot.everywhere
        there = inside_of(self._occupied, places, self.problem.bound)
        empty = (~there & (torch.rand(len(places), device=places.device) < self.empty_share)).nonzero()[:, 0]
        return replace(shot, kept=there.nonzero()[:, 0]), places[empty]

    def losses(self, turn: str, clock: Clock) -> dict[str, Tensor]:
        stage = self.stage(clock)
        shot, empty = self.thinned(self.rays(clock))
        teacher, student = self.problem.teacher, self.problem.student
        places = shot.places
        whole = student.geometry(torch.cat([places, empty]))  # both sets of points in one pass
        found = FieldOutput(whole.log_density[: len(places)], None if whole.feature is None else whole.feature[: len(places)])
        beyond = whole.log_density[len(places) :]
        with torch.no_grad():
            aim = teacher.geometry(places)
        if stage == 1:
            return {"feature": self.shallow(found, aim, self.there(shot, aim), None, beyond, clock)}
        views = shot.views
        with torch.no_grad():
            aim.colour = teacher.shade(places, views, aim.feature)
            truth = shot.composed(aim)
        found.colour = student.shade(places, views, found.feature)
        seen = shot.composed(found) if stage == 3 else None
        terms = self.inside(found, aim, *self.points(shot, aim, truth, seen), beyond, clock)
        if seen is not None:
            deep = {"pixels": distance(seen.colour - truth.colour, self.distance), **self.sparse(self.sparse_weight)}
            terms = {**deep, **terms, **self.deeper(shot, seen, truth)}
        return terms

    def there(self, shot: Shot, aim: FieldOutput) -> Tensor:
        """Numbers of the points whose interval takes more than `there_above` of the light in the teacher."""
        taken = -torch.expm1(-aim.log_density.exp() * shot.chosen(shot.lengths.reshape(-1)))
        return (taken > self.there_above).nonzero()[:, 0]

    def points(self, shot: Shot, aim: FieldOutput, truth: Rendered, seen: Rendered | None) -> tuple[Tensor, Tensor | None]:
        """Numbers of the points at which feature and colour are compared, and of those for log-density (None: all)."""
        return self.there(shot, aim), None

    def shallow(self, found: FieldOutput, aim: FieldOutput, pick: Tensor, dense: Tensor | None, beyond: Tensor, clock: Clock) -> Tensor:
        """The loss of the first block: log-density at `dense` and where there is nothing, features at `pick`."""
        assert found.feature is not None and aim.feature is not None
        difference = torch.cat([self.gap(found, aim, dense, beyond), (found.feature[pick] - aim.feature[pick]).flatten()])
        return self.k_feature * self.feature_decay**clock.step * distance(difference, self.distance)

    def gap(self, found: FieldOutput, aim: FieldOutput, dense: Tensor | None, beyond: Tensor) -> Tensor:
        """Differences of log-density, all kept in `s_clip`, at the points `dense` (None: all), and of the student's where the teacher has
        nothing, `beyond` `(E,)`, to the lower end."""
        low, high = self.s_clip
        own, aimed = (s if dense is None else s[dense] for s in (found.log_density, aim.log_density))
        return torch.cat([clamp_inward(own, low, high) - aimed.clamp(low, high), clamp_inward(beyond, low, high) - low])

    def inside(
        self, found: FieldOutput, aim: FieldOutput, pick: Tensor, dense: Tensor | None, beyond: Tensor, clock: Clock
    ) -> dict[str, Tensor]:
        """The losses at points: feature, colour, log-density."""
        assert found.colour is not None and aim.colour is not None
        terms = {"feature": self.shallow(found, aim, pick, dense, beyond, clock)} if self.features else {}
        terms["color"] = self.k_color * distance(found.colour[pick] - aim.colour[pick], self.distance)
        terms["sigma"] = self.k_sigma * distance(self.gap(found, aim, dense, beyond), self.distance)
        return terms

    def deeper(self, shot: Shot, seen: Rendered, truth: Rendered) -> dict[str, Tensor]:
        """Further losses on rays, for what is built on this; none here."""
        return {}
