"""The contract of this wing: what a method that makes a few-step generator may say. The first file to read before writing one.

One dataclass is one published method; the engine drives it through `SamplingProgram`. Time runs as in `limbeck.diffusion`: small t is data,
large t is noise, whatever a paper calls it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck import processes, schema
from limbeck.data.batch import Batch
from limbeck.diffusion import Denoiser, sample
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.method import Method
from limbeck.sampling.generator import Generator
from limbeck.sampling.pictures import Pictures


@dataclass
class Pair:
    """Teacher, student and everything around them, as a method's `setup` sees it.

    Attributes:
        teacher: frozen, guided as the recipe says; None for methods that learn from data alone.
        student: the network that is trained, unguided; it starts as a copy of the teacher unless the recipe names another.
        pictures: the training data in [-1, 1].
        spec: the recipe's `generate` block.
        training: its `training` block.
        total: steps to come.
        device, seed: of the run.
        session: for networks that a method trains beforehand; None keeps nothing.
    """

    teacher: Denoiser | None
    student: Denoiser
    pictures: Pictures
    spec: schema.Generate
    training: Any
    total: int
    device: torch.device
    seed: int = 0
    session: Session = field(default_factory=Session)

    @property
    def classes(self) -> int:
        """Classes that the student can be asked for; 0 for none."""
        return self.student.classes

    def labels(self, count: int) -> Tensor | None:
        """`(count,)` random classes from torch's global generator; None for unconditional networks."""
        return torch.randint(self.classes, (count,), device=self.device) if self.classes else None

    def noise(self, count: int) -> Tensor:
        """`(count, C, H, W)` standard normal noise from torch's global generator."""
        return torch.randn(count, *self.pictures.shape, device=self.device)

    def copy_of_teacher(self) -> Denoiser:
        """A trainable, unguided copy of the teacher: a fake score, a target network."""
        assert self.teacher is not None
        network = copy.deepcopy(self.teacher.network).to(self.device)
        return self.teacher.with_network(network.requires_grad_(True))

    def copy_of_student(self) -> Denoiser:
        """A frozen copy of the student as it is now."""
        return self.student.with_network(copy.deepcopy(self.student.network).eval().requires_grad_(False))


@dataclass
class FewStep(Method):
    """A method that makes a generator of one or a few steps. A subclass is a dataclass with a `card` and `losses`.

    Class attributes:
        data_free: no real picture is looked at; batches are then empty.
        needs_teacher: whether there must be a teacher.
        needs_classes: whether the networks must be conditional.
        one_step: whether its generator makes exactly one step.
        sampler: how its generator is sampled, a name of `limbeck.diffusion.SAMPLERS`.
        trains: False for methods that change only the sampling.
        contract: settings with which the contract test is quick; nothing else reads them.

    Attributes:
        pair: what it was set up for.
        parts: modules beside the student (critics, target networks), saved in checkpoints and then thrown away.
        state: tensors and plain data between steps, saved in checkpoints.
        made: the last generated batch, without gradient, for the collapse alarm; None when a method makes none.
        live: the last generated batch with its graph, and its labels, for terms that others add (`embedding-loss`); None likewise.
    """

    data_free: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True
    needs_classes: ClassVar[bool] = False
    one_step: ClassVar[bool] = False
    sampler: ClassVar[str] = "renoise"
    trains: ClassVar[bool] = True
    contract: ClassVar[Mapping[str, Any]] = {}

    def bind(self, pair: Pair) -> None:
        """Start afresh for a new job; called before `setup`.

        Raises:
            UserError: the method lacks something that it needs.
        """
        self.pair = pair
        self.parts = nn.ModuleDict()
        self.state: dict[str, Any] = {}
        self.made: Tensor | None = None
        self.live: tuple[Tensor, Tensor | None] | None = None
        if self.needs_teacher and pair.teacher is None:
            raise UserError(f"{self.card.id} learns from a teacher, and the recipe names none", "add a `teacher` block")
        if self.needs_classes and not pair.classes:
            raise UserError(
                f"{self.card.id} needs networks with classes, and these have none", "give labelled data and a conditional teacher"
            )
        if self.one_step and any(steps != 1 for steps in pair.spec.steps):
            raise UserError(
                f"{self.card.id} makes a generator of one step, and generate.steps asks for {max(pair.spec.steps)}",
                "set generate.steps=[1]",
            )

    # ---- what a method may override ----

    def needs_pictures(self) -> bool:
        """Whether training batches are real pictures."""
        return not self.data_free

    def setup(self, pair: Pair) -> None:
        """Build `parts` and `state`."""

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        """One optimiser for each turn; by default the student's alone, as the recipe's `training` block says."""
        return {"student": make_optimizer(pair.training, [p for p in pair.student.network.parameters() if p.requires_grad])}

    def turns(self, clock: Clock) -> Sequence[str]:
        """Whose turn it is in this step, in order: names of optimisers."""
        return ("student",)

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """The terms of one turn by name: scalars that the engine sums and back-propagates.

        Args:
            batch: pictures in [-1, 1] and their labels (the null label where one is hidden); for a data-free method an empty tick.
        """
        raise NotImplementedError

    def after_step(self, clock: Clock) -> None:
        """After the optimisers: averages, memories."""

    def alarms(self) -> list[str]:
        """What the log should warn of since the last time, each one line."""
        return []

    def finish(self, student: Denoiser) -> Generator:
        """The generator that is kept.

        Args:
            student: the trained network (the moving average where there is one).
        """
        return Generator(student, self.pair.pictures.shape, sampler=self.pair.spec.sampler or self.sampler, options=self.sampling())

    def sampling(self) -> dict[str, Any]:
        """Options of the sampler (`eta`, `start`, `grid`)."""
        return {}

    def figures(self, generator: Generator) -> dict[str, float]:
        """Further figures of the finished generator for the summary (what a mechanism claims)."""
        return {}

    # ---- help ----

    def show(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Note a generated batch for the collapse alarm and for others' terms; returns it."""
        self.made, self.live = x.detach(), (x, labels)
        return x

    @property
    def batch_size(self) -> int:
        """Samples a step."""
        return int(self.pair.training.batch) // processes.world()

    def endpoint_error(self, generator: Generator, steps: int = 1, count: int = 256) -> float:
        """Root mean squared difference between generator and teacher (32 Heun steps) from the same noise; for methods that keep paths."""
        pair = self.pair
        rng = torch.Generator().manual_seed(pair.seed)
        noise = torch.randn(count, *pair.pictures.shape, generator=rng).to(pair.device)
        labels = None if not pair.classes else (torch.arange(count) % pair.classes).to(pair.device)
        assert pair.teacher is not None
        aim = sample(pair.teacher, noise, labels, steps=32, sampler="heun", grid=pair.spec.grid)
        return float((generator.from_noise(noise, labels, steps, rng=rng) - aim).square().mean().sqrt())


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Forward passes inside give gradients to inputs, not to these modules' own weights."""
    asking = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
