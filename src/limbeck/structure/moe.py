"""What methods share that make a mixture of experts smaller: calibration, the loss on the teacher's likeliest tokens, a balanced router."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.data.batches import Batches
from limbeck.engine.clock import Clock
from limbeck.knowledge.distiller import Models
from limbeck.losses import vocabulary
from limbeck.losses.vocabulary import Law, Sparse
from limbeck.method import setting
from limbeck.signals.signals import Signals
from limbeck.structure import experts
from limbeck.structure.shaper import Making, Pair, Shaper


@dataclass
class MixtureShaper(Shaper):
    """Base: loss = -mean sum_{v in K} p_T(v) log q_S(v) + tail + balance * load-balancing loss, K the teacher's `likely` likeliest tokens.

    The teacher's probabilities are not scaled to sum to 1 over K. tail = -(1 - p_T(K)) log (1 - q_S(K)) takes all other tokens for one.
    """

    tasks: ClassVar[tuple[str, ...]] = ("language",)
    student_wants: ClassVar[tuple[str, ...]] = ("law",)
    teacher_wants: ClassVar[tuple[str, ...]] = ("law",)
    contract: ClassVar[Mapping[str, Any]] = {
        "calibration": 1,
        "recipe": {
            "teacher": {
                "model": "mixtral",
                "args": {"layers": 1, "width": 16, "heads": 2, "inner": 16, "num_local_experts": 4},
                "train": {"steps": 4, "batch": 8, "lr": 0.01},
            },
            "student": {"model": "teacher"},
        },
    }

    likely: int = setting(8, "tokens of the teacher's distribution that count at each position (top-8)", at_least=1)
    rest: str = setting(
        "bucket",
        "the other tokens: one bucket, or nothing as recalled of the paper, which then wants a student that never says them",
        choices=("bucket", "drop"),
    )
    balance: float = setting(1e-3, "weight of the router's load-balancing loss; Mixtral's default, small as the paper wants it", at_least=0)
    calibration: int = setting(8, "batches over which sensitivities are averaged", at_least=1)

    def reshape(self, student: nn.Module, making: Making) -> nn.Module:
        """Score on calibration batches, then cut in one shot.

        Raises:
            UserError: no mixture of experts of a known kind, sizes that are no cut, or a budget that cannot be met.
        """
        layers = experts.mixture_layers(student)
        scores = experts.sensitivity(student, layers, self._losses(student, making))
        return self.cut(student, layers, scores, making)

    def cut(self, student: nn.Module, layers: list[experts.Layer], scores: list[experts.Sensitivity], making: Making) -> nn.Module:
        """The smaller model."""
        raise NotImplementedError

    def _losses(self, student: nn.Module, making: Making) -> list[Callable[[], Tensor]]:
        """The loss of the text on each calibration batch: that of the teacher's tokens is all but flat while the two agree."""
        read = making.task.reader(student, ("law",))
        batches = Batches(making.data.train, min(making.training.batch, len(making.data.train)), seed=making.seed)

        def loss(batch: Batch) -> Tensor:
            return making.task.hard_loss(read(batch).law, batch.labels)

        return [partial(loss, batch.to(making.device)) for _, batch in zip(range(self.calibration), batches.epoch(0))]

    # ---- recovering ----

    def setup(self, pair: Pair) -> None:
        """Find the routers."""
        self._layers = experts.mixture_layers(pair.student)

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """Read both, and what the student's routers say."""
        teacher = models.teacher(batch)
        with experts.router_logits(models.module, self._layers) as routed:
            student = models.student(batch)
        terms = self.loss(batch, student, teacher, clock)
        if self.balance:
            mask = batch.inputs.get("attention_mask")
            each = int(models.module.config.num_experts_per_tok)  # type: ignore[union-attr, arg-type]
            terms["balance"] = self.balance * experts.balance_loss(routed, each, mask)
        return terms

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`likely`."""
        return {"likely": likely_tokens(student.law, teacher.law, self.likely, self.rest)}


def likely_tokens(student: Law, teacher: Law | Sparse, k: int, rest: str = "drop") -> Tensor:
    """-mean over positions of sum_{v in K} p_T(v) log q_S(v), K the teacher's k likeliest tokens, p_T as it is (sum below 1).

    With m the mass of K and p' = p_T / m this is m (KL(p' || q_S) + H(p')): the existing loss over chunks of rows, so that logits of all
    positions never exist. With `rest` "bucket" the tail -(1 - m) log(1 - q_S(K)) is added: the smallest loss is then at q_S = p_T on K,
    while without it it is at q_S = p', which takes all probability from the other tokens.

    Args:
        student: N positions.
        teacher: N positions, or a stored top k of at least k tokens.
        k: tokens.
        rest: "bucket" or "drop".

    >>> import torch
    >>> likely_tokens(Law(dense=torch.zeros(1, 4)), Law(dense=torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]]))), 2)  # 0.75 ln 4
    tensor(1.0397)
    """
    if isinstance(teacher, Sparse):
        top = Sparse(teacher.ids[:, :k], teacher.logs[:, :k].detach(), teacher.width)
    else:
        top = vocabulary.top_k(teacher.detach(), min(k, teacher.width))
    logs = top.logs.to(student.dtype)
    if rest == "bucket":
        tail = (1 - logs.exp().sum(1)).clamp_min(1e-8) if top.ids.shape[1] < top.width else logs.new_ones(len(top))
        own = -(logs.exp() * logs).sum(1) - tail * tail.log()
        return vocabulary.divergence(student, top, "forward") + own.sum() / max(len(top), 1)
    mass = logs.exp().sum(1)
    entropy = -(logs.exp() * (logs - mass.log().unsqueeze(1))).sum(1)
    distance = vocabulary.divergence(student, top, "forward", rest="renormalise", weight=mass)
    return distance + entropy.sum() / max(len(top), 1)
