"""KRR-ST: condense unlabelled data into inputs and target representations, through kernel ridge regression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.condensation.condenser import Condenser
from limbeck.condensation.problem import Problem
from limbeck.condensation.self_supervised import VIEWS, BarlowProgram
from limbeck.condensation.students import Lessons, train_students
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.data.augment import Augment
from limbeck.data.batches import own_randomness
from limbeck.data.choose import generator
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.losses.kernel import kernel_ridge_prediction
from limbeck.method import Card, setting
from limbeck.schema import Training
from limbeck.signals import Reader


@dataclass
class KRRST(Condenser):
    """A few inputs and learnt targets that pre-train a network like self-supervised learning on all the data; labels are never used.

    F_s = [g(X_s), 1], F_r = [g(A(X_r)), 1], P = F_r F_s^T (F_s F_s^T + lambda I)^{-1} Y_s, lambda = 1e-6 tr(F_s F_s^T), and
    L = mean (P - h(A(X_r)))^2 with h a self-supervised network and g drawn from a pool of networks, each of which then makes one step
    on mean (f(X_s) - Y_s)^2.
    The set is used by pre-training a network on it with squared error; it is judged by a linear probe.
    """

    card = Card(
        id="krr-st",
        title="Self-supervised dataset distillation for transfer learning",
        year=2023,
        wing="condensation",
        family="self-supervised",
        claim="A few inputs with learnt target representations pre-train networks for transfer almost as well as the whole unlabelled set.",
        equation="L = | F_r F_s^T (F_s F_s^T + lambda I)^-1 Y_s - h(A(X_r)) |^2",
        arxiv="2310.06511",
        baseline="random-real",
        deviations=(
            "The self-supervised network is a small one trained by Barlow Twins, its features divided by their standard deviation. A pool "
            "network that has made its steps starts again with a fresh counter (the released code forgets to reset it)."
        ),
    )
    schedule = "linear"
    unlabelled = True
    contract = {"pool": 2, "online_steps": 3, "batch_real": 16, "teacher_epochs": 1}

    iterations: int = setting(160000, "outer steps; 0 keeps random samples with their targets (paper: 160000)", at_least=0)
    lr_set: float = setting(1e-4, "AdamW's learning rate for inputs and targets, linearly to 0 (paper: 1e-4)", above=0)
    batch_real: int = setting(1024, "real samples in an outer step (paper: 1024)", at_least=2)
    pool: int = setting(10, "networks in the pool (paper: 10)", at_least=1)
    online_steps: int = setting(1000, "steps after which a pool network starts again (paper: 1000)", at_least=1)
    online_lr: float = setting(0.1, "learning rate of the pool networks (paper: 0.1)", above=0)
    online_momentum: float = setting(0.9, "their momentum (paper: 0.9)", at_least=0, at_most=0.999)
    online_decay: float = setting(1e-3, "their weight decay (paper: 1e-3)", at_least=0)
    teacher_epochs: float = setting(100.0, "epochs of the self-supervised network", above=0)
    teacher_lr: float = setting(2e-3, "its learning rate (AdamW)", above=0)
    source_classes: tuple[int, ...] = setting((), "condense samples of these classes only, and probe on the others; none: all for both")
    probe_steps: int = setting(300, "steps of pre-training when features are compared", at_least=1)

    # ---- the unlabelled source and its self-supervised network ----

    def prepare(self, problem: Problem) -> None:
        bad = [c for c in self.source_classes if not 0 <= c < problem.classes]
        if bad:
            raise UserError(f"krr-st: there is no class number {bad[0]}", f"classes are numbered 0 to {problem.classes - 1}")
        chosen = self.source_classes or range(problem.classes)
        self._source = torch.cat([problem.of_class(c) for c in chosen]).sort().values
        if len(self._source) < problem.per_class * problem.classes:
            raise UserError(
                f"krr-st: the source has {len(self._source)} samples, fewer than the {problem.per_class * problem.classes} to be made",
                "lower condense.per_class, or name more source_classes",
            )
        self._target = self._features(problem)
        self._augment = Augment(VIEWS) if problem.images else None

    def _features(self, problem: Problem) -> Any:
        """h: standardised inputs to `(B, d)` features of about unit spread."""
        width = problem.anatomy.embedding_shape
        assert width is not None
        self._width = int(torch.tensor(width[1:]).prod())
        if problem.teachers:
            reader = Reader(next(iter(problem.teachers.values())), ("embedding",), grad=False, stop_early=True)
            read = lambda x: reader(x).embedding  # noqa: E731
        else:
            with own_randomness(problem.seed, 62):
                network = problem.network(outputs=self._width)
            program = BarlowProgram(
                network, self._width, self._source, problem, self.teacher_epochs, self.batch_real, self.teacher_lr, problem.seed
            )
            problem.session.fit(program, "self-supervised", seed=problem.seed, digest=str(self.values()), evaluate=False)
            trained = network.eval().requires_grad_(False)
            read = lambda x: trained(x)  # noqa: E731
        with torch.no_grad():
            said = torch.cat([read(problem.at(index)) for index in self._source.split(1024)])
        mean, std = said.mean(0), (said - said.mean(0)).std().clamp_min(1e-6)
        self._width = said.shape[1]

        def features(x: Tensor) -> Tensor:
            with torch.no_grad():
                return (read(x) - mean) / std

        return features

    # ---- the set and the pool ----

    def begin(self, problem: Problem) -> SyntheticSet:
        count = problem.per_class * problem.classes
        index = self._source[torch.randperm(len(self._source), generator=generator(problem.seed, 11))[:count]]
        made = self._targeted(problem.at(index), problem)
        if self.iterations:
            self._nets = [_PoolNetwork(problem, self._width, self) for _ in range(self.pool)]
            for net in self._nets:
                net.begin(int(torch.randint(1, max(2, self.online_steps), ())), made)
        return made

    def _targeted(self, x: Tensor, problem: Problem) -> SyntheticSet:
        made = problem.make(x, torch.zeros(len(x), dtype=torch.long, device=x.device), targets=self._target(x))
        others = (
            [c for c in range(problem.classes) if c not in self.source_classes] if self.source_classes else list(range(problem.classes))
        )
        made.how = {**made.how, "loss": "mse", "probe_classes": others}
        return made

    def soften(self, set: SyntheticSet, problem: Problem) -> SyntheticSet | None:
        """The self-supervised network's features as targets."""
        return self._targeted(set.decode()[0].detach(), problem)

    def modules(self) -> dict[str, nn.Module]:
        return {f"pool{number}": net.network for number, net in enumerate(self._nets)} if self.iterations else {}

    def optimizers(self, set: SyntheticSet) -> dict[str, torch.optim.Optimizer]:
        return {"set": torch.optim.AdamW([set.images, set.targets], self.lr_set)} if self.iterations else {}

    def losses(self, turn: str, set: SyntheticSet, problem: Problem, clock: Clock) -> dict[str, Tensor]:
        self._net = self._nets[int(torch.randint(self.pool, ()))]
        index = self._source[torch.randint(len(self._source), (self.batch_real,))]
        x = problem.at(index)
        if self._augment is not None:
            x = self._augment(x)
        with torch.no_grad():
            queries = self._net.features(x)
        assert set.targets is not None
        said = kernel_ridge_prediction(self._net.features(set.images), set.targets, queries)
        return {"regression": F.mse_loss(said, self._target(x))}

    def after_step(self, set: SyntheticSet, problem: Problem, clock: Clock) -> None:
        """The network that was drawn makes one step on the set as it is now."""
        self._net.step(set)
        if self._net.steps >= self.online_steps:
            self._net.renew()

    def memory(self) -> dict[str, Any]:
        return {"pool": [net.memory() for net in self._nets]}

    def restore(self, memory: Mapping[str, Any]) -> None:
        for net, kept in zip(self._nets, memory["pool"]):
            net.restore(kept)

    # ---- what it came to ----

    def figures(self, set: SyntheticSet, problem: Problem) -> dict[str, float]:
        """`feature_mse`: error of fresh networks, pre-trained on the set, to the self-supervised features of all source samples."""
        with own_randomness(problem.seed, 63):
            networks = [problem.network(outputs=self._width) for _ in range(3)]
        assert set.targets is not None
        training = Training(steps=self.probe_steps, batch=256, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4, warmup=0)
        lessons = Lessons(set.images.detach(), set.targets.detach(), 256, seed=problem.seed)
        trained = train_students(networks, lessons, training, [0.05] * 3, {"loss": "mse"})
        errors = []
        with torch.no_grad():
            for index in self._source.split(1024):
                x = problem.at(index)
                errors.append(torch.stack([((n(x) - self._target(x)) ** 2).mean(1) for n in trained]).mean(0))
        return {"feature_mse": float(torch.cat(errors).mean())}


class _PoolNetwork:
    """A network that follows the set by steps of plain SGD and lends its features to the regression."""

    def __init__(self, problem: Problem, outputs: int, method: KRRST) -> None:
        self.problem, self.outputs, self.method, self.steps = problem, outputs, method, 0
        self.network = problem.network(outputs=outputs)
        self._reader = problem.reader(self.network, "embedding")
        self._optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.SGD:
        m = self.method
        return torch.optim.SGD(self.network.parameters(), m.online_lr, m.online_momentum, weight_decay=m.online_decay)

    def features(self, x: Tensor) -> Tensor:
        """`(B, p)` in evaluation mode; gradients reach `x` only."""
        self.network.eval()
        return self._reader(x).embedding

    def begin(self, steps: int, set: SyntheticSet) -> None:
        """Make some steps at once, so that the pool holds networks of all ages."""
        for _ in range(steps):
            self.step(set)

    def step(self, set: SyntheticSet) -> None:
        """One step on mean (f(X_s) - Y_s)^2 with the set detached."""
        assert set.targets is not None
        self.network.train()
        self._optimizer.zero_grad()
        F.mse_loss(self.network(set.images.detach()), set.targets.detach()).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.steps += 1

    def renew(self) -> None:
        """Begin again with new weights, a new optimiser and no steps made."""
        new = self.problem.network(outputs=self.outputs)
        self.network.load_state_dict(new.state_dict())
        self._optimizer, self.steps = self._new_optimizer(), 0

    def memory(self) -> dict[str, Any]:
        kept = [self._optimizer.state[p].get("momentum_buffer") for p in self.network.parameters()]
        return {"steps": self.steps, "momentum": [b for b in kept if b is not None]}

    def restore(self, memory: Mapping[str, Any]) -> None:
        self.steps = int(memory["steps"])
        self._optimizer = self._new_optimizer()
        for parameter, buffer in zip(self.network.parameters(), memory["momentum"]):
            self._optimizer.state[parameter]["momentum_buffer"] = buffer.to(parameter.device)
