"""What the methods share that optimise pictures or drawings under a score model: rendering, noising, the surrogate, the follower.

A method is one function, `direction`: what is subtracted from what the score model says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck import models, schema, zoo
from limbeck.data.pictures import Pictures
from limbeck.diffusion import Denoiser, expand
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.errors import UserError
from limbeck.losses import annealed, guided_prediction, level_weight, score_surrogate
from limbeck.losses.score import WEIGHTS
from limbeck.method import setting
from limbeck.scenes.scene_method import Problem, SceneMethod


@dataclass
class PictureProblem(Problem):
    """Pictures or drawings under a score model.

    Attributes:
        pictures: what may come out, in [-1, 1].
        labels: `(V,)` the class that each variant is asked to be of; the number of classes where it is asked for none; None for data
            without classes.
        judge: measures students (`limbeck.scenes.pictures_judge.PictureJudge`).
    """

    pictures: Pictures = None  # type: ignore[assignment]
    labels: Tensor | None = None
    judge: Any = None

    def watch(self, student: nn.Module) -> dict[str, float]:
        return {} if self.judge is None else self.judge.glance(student)


@dataclass
class Noised:
    """A batch of renderings, noised, and what the score model says of it; everything is without gradient.

    Attributes:
        prior: the score model, unguided. x: `(B, C, H, W)` renderings. noise: what was added.
        place, t, state: `(B,)` place in [0, 1] and time in the prior's process, and the noisy pictures.
        labels: `(B,)` or None. pick: `(B,)` which variants they are.
        low: the lowest place of now.
    """

    prior: Denoiser
    x: Tensor
    noise: Tensor
    place: Tensor
    labels: Tensor | None
    pick: Tensor
    low: float

    def __post_init__(self) -> None:
        self.t = self.prior.process.at(self.place)
        self.state = self.prior.process.diffuse(self.x, self.noise, self.t)

    @property
    def angle(self) -> Tensor:
        """`(B,)` noise level atan2(sigma, alpha)."""
        return self.prior.process.angle(self.t)

    def given(self) -> Tensor:
        """The prior's noise prediction under the labels."""
        return self.prior.noise(self.state, self.t, self.labels)

    def free(self) -> Tensor:
        """The prior's noise prediction under no condition."""
        none = None if self.labels is None else torch.full_like(self.labels, self.prior.classes)
        return self.prior.noise(self.state, self.t, none)

    def guided(self, scale: float) -> Tensor:
        """free + scale (given - free); without labels there is nothing to guide by."""
        given = self.given()
        return given if self.labels is None or scale == 1 else guided_prediction(self.free(), given, scale)

    def at(self, place: Tensor) -> Noised:
        """The same renderings with the same noise at other places."""
        return Noised(self.prior, self.x, self.noise, place, self.labels, self.pick, self.low)


@dataclass
class ScoreDistillation(SceneMethod):
    """Base of the methods of this half of the wing. A subclass says `direction`, or `gradient` as a whole.

    A step renders some variants, noises them, asks for a gradient and sends it back through the rendering alone (Poole et al. 2022,
    arXiv:2209.14988): never through a score network.
    """

    kind: ClassVar[str] = "picture"
    anneal: ClassVar[str] = "step"

    guidance: float = setting(7.5, "classifier-free guidance of the score model", at_least=0)
    weight: str = setting("sds", "of noise levels: sds (1 - abar), uniform, fantasia3d (sqrt(abar) (1 - abar))", choices=WEIGHTS)
    levels: tuple[float, float] = setting((0.02, 0.98), "lowest and highest noise level at first, places in [0, 1]", at_least=0, at_most=1)
    levels_end: tuple[float, float] = setting((0.02, 0.5), "the same at the end (paper: after 5000 of 25000 steps)", at_least=0, at_most=1)
    anneal_at: float = setting(
        0.2, "share of the run after which `levels_end` holds (where levels change in one step)", at_least=0, at_most=1
    )

    # ---- what a method says ----

    def direction(self, at: Noised) -> Tensor:
        """`(B, C, H, W)` a difference of noise predictions; renderings move along minus it."""
        raise NotImplementedError

    def gradient(self, at: Noised) -> Tensor:
        """`(B, C, H, W)` the gradient of the loss with respect to the renderings, times the batch size."""
        return expand(level_weight(at.angle, self.weight), at.x) * self.direction(at)

    def extra_losses(self, pick: Tensor, x: Tensor, clock: Clock) -> dict[str, Tensor]:
        """Further terms of the student's turn, for its renderings `x` (with gradient)."""
        return {}

    def make_student(self, spec: schema.Model, problem: PictureProblem) -> nn.Module:
        """What is optimised, from the recipe's `student` block."""
        return build_student(spec, problem)

    # ---- how it is done ----

    def setup(self, problem: PictureProblem) -> None:
        for first, last in (self.levels, self.levels_end):
            if first >= last:
                raise UserError(f"{self.card.id}: noise levels from {first} to {last}", "give the lower one first")

    def picks(self) -> Tensor:
        """`(B,)` variants of this step: all different as long as there are enough."""
        problem = self.problem
        count, variants = int(problem.training.batch), int(problem.student.variants)
        if count <= variants:
            return torch.randperm(variants, device=problem.device)[:count]
        return torch.cat([torch.randperm(variants, device=problem.device) for _ in range(-(-count // variants))])[:count]

    def noised(self, x: Tensor, pick: Tensor, clock: Clock) -> Noised:
        """Renderings at random noise levels of now."""
        low, high = annealed(self.levels, self.levels_end, clock.progress, self.anneal, self.anneal_at)
        place = low + (high - low) * torch.rand(len(x), device=x.device)
        return Noised(self.problem.teacher, x, self.noise(x), place, self.asked(pick), pick, low)

    def noise(self, x: Tensor) -> Tensor:
        """What is added to renderings."""
        return torch.randn_like(x)

    def asked(self, pick: Tensor) -> Tensor | None:
        """The classes that variants are asked to be of."""
        labels = self.problem.labels
        return None if labels is None or not self.problem.teacher.classes else labels[pick]

    def losses(self, turn: str, clock: Clock) -> dict[str, Tensor]:
        pick = self.picks()
        x = self.problem.student.render(pick)
        self.made = x.detach(), pick
        with torch.no_grad():
            gradient = self.gradient(self.noised(x.detach(), pick, clock))
        return {"score": score_surrogate(x, gradient), **self.extra_losses(pick, x, clock)}


@dataclass
class Following(ScoreDistillation):
    """Base of the methods with a follower: a copy of the score model that learns, on the fly, the noise in what is rendered now.

    The follower's label table has a row for each view and one for each class: told a view it speaks of that view, told a class of all
    views of it. Both begin as the score model's own rows, so that the follower begins as the score model itself. Where the score model is
    exact and no network, the follower is a fresh fully connected denoiser.
    """

    lr_fake: float = setting(1e-3, "learning rate of the follower (paper: 1e-4, for adapters on a large network)", above=0)
    ratio: int = setting(1, "updates of the follower for each one of the student", at_least=1)
    view: str = setting(
        "auto", "whether the follower is told the view; auto: where the student renders views", choices=("auto", "yes", "no")
    )
    drop: float = setting(0.1, "share of its samples without the view (paper: 0.1)", at_least=0, at_most=1)
    width: int = setting(128, "of a fresh follower", at_least=1)

    @property
    def told(self) -> bool:
        """Whether the follower is told the view."""
        return self.view == "yes" or (self.view == "auto" and bool(getattr(self.problem.student, "views", False)))

    def setup(self, problem: PictureProblem) -> None:
        super().setup(problem)
        self.fake = follower(problem, self.width)
        self.parts["fake"] = self.fake.network

    def optimizers(self, problem: PictureProblem) -> dict[str, torch.optim.Optimizer]:
        changes = {"optimizer": "adam", "lr": self.lr_fake, "weight_decay": 0.0}
        return {**super().optimizers(problem), "fake": make_optimizer(problem.training, self.fake.network.parameters(), **changes)}

    def turns(self, clock: Clock) -> Sequence[str]:
        return ("student", *("fake",) * self.ratio)

    def condition(self, pick: Tensor, told: Tensor | bool) -> Tensor:
        """`(B,)` rows of the follower's table: the view's where `told`, else the class's."""
        views, labels = int(self.problem.student.variants), self.asked(pick)
        own = torch.full_like(pick, self.fake.classes) if labels is None else views + labels
        return torch.where(torch.as_tensor(told, device=pick.device), pick, own)

    def follows(self, at: Noised, told: bool) -> Tensor:
        """The follower's noise prediction, told the view or not."""
        return self.fake.noise(at.state, at.t, self.condition(at.pick, told))

    def losses(self, turn: str, clock: Clock) -> dict[str, Tensor]:
        if turn == "student":
            return super().losses(turn, clock)
        x, pick = self.made
        noise, t = torch.randn_like(x), self.fake.process.draw(len(x), "uniform", 0.0, 1.0, x.device)
        told = (torch.rand(len(x), device=x.device) >= self.drop) & self.told
        return {"fake": self.fake.denoising_loss(x, noise, t, self.condition(pick, told))}


def follower(problem: PictureProblem, width: int) -> Denoiser:
    """A trainable denoiser with a row for each view, for each class, and for none; a copy of the prior where that is a network."""
    prior, views = problem.teacher, int(problem.student.variants)
    config = getattr(prior.network, "limbeck_config", None)
    rows = views + prior.classes
    table = getattr(getattr(prior.network, "condition", None), "label", None)
    if config is None or not isinstance(table, nn.Embedding):
        network = zoo.build("denoising-mlp", input_shape=problem.pictures.shape, classes=rows, width=width)
        return Denoiser(network.to(problem.device), prior.process, "v", classes=rows)
    network = zoo.build(config["ref"], **{**config["args"], "classes": rows}).to(problem.device)
    own = dict(prior.network.state_dict())
    labels = problem.labels if problem.labels is not None and prior.classes else torch.full((views,), prior.classes, device=problem.device)
    old = own["condition.label.weight"]
    own["condition.label.weight"] = torch.cat([old[labels.to(old.device)], old])
    network.load_state_dict(own)
    return Denoiser(network, prior.own, prior.prediction, classes=rows, code=prior.code, sigma_data=prior.sigma_data).under(prior.process)


def build_student(spec: schema.Model, problem: PictureProblem, ref: str | None = None, **args: Any) -> nn.Module:
    """A renderer of `scene.variants` variants.

    Raises:
        UserError: the network renders nothing, or is told the number of variants twice.
    """
    if "variants" in spec.args:
        raise UserError("student.args.variants is scene.variants", "set scene.variants")
    named = spec.model_copy(update={"model": ref or spec.model, "args": {**spec.args, **args, "variants": problem.spec.variants}})
    if ref is None and spec.model.removeprefix("zoo:") in zoo.NETWORKS:
        raise UserError(
            f"the student {spec.model} renders no pictures",
            "name one that does: particles, picture-generator or drawing; see docs/scenes.md",
        )
    made = models.build(named, problem.pictures.data, problem.seed, "student")
    if not hasattr(made, "render") or not hasattr(made, "variants"):
        raise UserError(
            f"the student is a {type(made).__name__}, which renders no pictures", "name particles, picture-generator or drawing"
        )
    return made
