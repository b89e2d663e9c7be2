"""TGeo-KD: a learned ratio per sample between teacher and label."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import one_hot

from limbeck.data.batch import Batch
from limbeck.data.batches import Batches
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.losses import cross_entropy, forward_kl
from limbeck.method import Card, setting
from limbeck.signals import logits_of
from limbeck.signals.signals import Signals


@dataclass
class TGeoKD(Distiller):
    """A tiny network sees how student S, teacher T, label G and the teacher's class average lie, and says how far to trust the teacher.

    inner: mean_b alpha_b tau^2 KL(t || s) + (1 - alpha_b) CE(s, y), alpha_b = controller(state_b) in (0, 1)
    outer: CE of the student after one such step, on a validation batch; its gradient reaches the controller through that step.
    Logits are (B, C), the state is (B, 9C). The two turns alternate: "controller" every `outer_every` steps, then "student".
    """

    card = Card(
        id="tgeo-kd",
        title="Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation",
        year=2023,
        arxiv="2312.15112",
        wing="knowledge",
        family="weighting",
        claim="A sample-wise fusion ratio, learned by bilevel optimisation, beats other ways to weigh teacher against label.",
        equation="alpha tau^2 KL(t||s) + (1 - alpha) CE(s, y), alpha = sigmoid(MLP([S, T, G, Tbar, squares of their differences]))",
        deviations="The released script cuts the gradient between controller and validation loss; this is the unrolled step of the paper. "
        "The controller's rate is 1e-3 instead of the released 0.1, and follows the run's schedule. "
        "Unlabelled samples learn from the teacher alone.",
    )
    needs_valid: ClassVar[bool] = True

    temperature: float = setting(1.5, "tau of the teacher's term; 1.5 released, 4 for CIFAR-like data", above=0)
    controller_lr: float = setting(1e-3, "Adam's rate for the controller (0.1 in the released toy)", above=0)
    controller_decay: float = setting(0.05, "its weight decay, released", at_least=0)
    unroll_lr: float = setting(0.1, "eta, the length of the unrolled student step", above=0)
    outer_every: int = setting(1, "student steps for each controller step", at_least=1)

    def setup(self, pair: Pair) -> None:
        """The controller, the teacher's mean probabilities of each class, and where validation batches come from."""
        self.check_one_class(pair)
        classes = pair.student_signals.logits.shape[-1]
        layers = (nn.Linear(9 * classes, 32), nn.LeakyReLU(0.01), nn.Linear(32, 16), nn.LeakyReLU(0.01), nn.Linear(16, 1), nn.Sigmoid())
        self.parts["controller"] = nn.Sequential(*layers)
        sums, counts = torch.zeros(classes, classes, device=pair.device), torch.zeros(classes, 1, device=pair.device)
        for batch in Batches(pair.data.train.with_augment(None), 512, shuffle=False).epoch(0):
            batch = batch.to(pair.device)
            with torch.no_grad():
                probabilities = pair.teacher(batch).logits.float().softmax(-1)
            belongs = one_hot(self._labels(batch, probabilities), classes).to(probabilities)
            sums += belongs.T @ probabilities
            counts += belongs.sum(0).unsqueeze(1)
        self.state["average"] = sums / counts.clamp_min(1)
        valid = pair.data.valid
        assert valid is not None
        self._valid = Batches(valid, min(pair.training.batch, len(valid)), seed=0, drop_last=len(valid) > pair.training.batch)
        self._device = pair.device

    @staticmethod
    def _labels(batch: Batch, teacher: Tensor) -> Tensor:
        """The label, or the teacher's choice where it is hidden."""
        return teacher.argmax(-1) if batch.labels is None else torch.where(batch.labelled, batch.labels, teacher.argmax(-1))

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        """The student's, and Adam for the controller."""
        own = {"optimizer": "adam", "lr": self.controller_lr, "weight_decay": self.controller_decay}
        return {
            "controller": make_optimizer(pair.training, self.parts.parameters(), **own),
            "student": make_optimizer(pair.training, [p for p in pair.student.parameters() if p.requires_grad]),
        }

    def turns(self, clock: Clock) -> Sequence[str]:
        """The controller first, every `outer_every` steps, so that the student uses refreshed ratios."""
        return ("controller", "student") if clock.step % self.outer_every == 0 else ("student",)

    def ratios(self, batch: Batch, student: Tensor, teacher: Tensor) -> Tensor:
        """`(B,)` alpha in (0, 1), with gradient to the controller only; 1 for unlabelled samples."""
        kind = next(self.parts["controller"].parameters()).dtype
        s, t = student.detach().to(kind).softmax(-1), teacher.detach().to(kind).softmax(-1)
        labels = self._labels(batch, t)
        g, average = one_hot(labels, s.shape[-1]).to(s), self.state["average"][labels]
        parts = [s, t, g, average, average - s, g - s, t - s, t - g, average - g]
        alpha = self.parts["controller"](torch.cat(parts[:4] + [part.square() for part in parts[4:]], 1)).squeeze(1)
        return torch.where(batch.labelled.to(alpha.device), alpha, torch.ones_like(alpha))

    def inner(self, batch: Batch, student: Tensor, teacher: Tensor, alpha: Tensor) -> dict[str, Tensor]:
        """The two weighted terms, means over the batch."""
        hard = torch.zeros_like(alpha) if batch.labels is None else cross_entropy(student, batch.labels, reduction="none")
        return {"kl": forward_kl(student, teacher, temperature=self.temperature, weight=alpha), "ce": ((1 - alpha) * hard).mean()}

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """The student's turn: ratios are constants here."""
        alpha = self.ratios(batch, student.logits, teacher.logits).detach()
        return self.inner(batch, student.logits, teacher.logits, alpha)

    def losses(self, turn: str, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """The controller's turn is the outer step; the student's the ordinary one."""
        return self.outer(batch, models, clock) if turn == "controller" else self.step(batch, models, clock)

    def outer(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """Validation loss after one unrolled step `theta - eta grad J_train(theta, omega)`; running statistics are frozen meanwhile."""
        valid = self._valid.batch_at(*divmod(clock.step, self._valid.steps_per_epoch)).to(self._device)
        weights = {name: p for name, p in models.module.named_parameters() if p.requires_grad}
        teacher = models.teacher(batch).logits
        with _frozen_statistics(models.module):
            said = _forward(models.module, weights, batch.inputs)
            terms = self.inner(batch, said, teacher, self.ratios(batch, said, teacher))
            gradients = torch.autograd.grad(terms["kl"] + terms["ce"], list(weights.values()), create_graph=True)
            moved = {name: p - self.unroll_lr * g for (name, p), g in zip(weights.items(), gradients)}
            return {"validation": self.hard(valid, _forward(models.module, moved, valid.inputs))}


def _forward(module: nn.Module, weights: dict[str, Tensor], inputs: Any) -> Tensor:
    if isinstance(inputs, dict):
        return logits_of(functional_call(module, weights, (), inputs))
    return logits_of(functional_call(module, weights, inputs if isinstance(inputs, tuple) else (inputs,)))


@contextmanager
def _frozen_statistics(module: nn.Module) -> Any:
    """Evaluation mode inside the block, each module's own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
