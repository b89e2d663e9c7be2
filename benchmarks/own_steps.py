"""limbeck's arms and the hand-written loop that the step benchmarks share: kd alone, with feature maps, with a contrast."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peer_steps import ALPHA, TEMPERATURE, contrast, pooled_distance
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.knowledge.distiller import Pair
from limbeck.knowledge.methods.kd import KD
from limbeck.signals.signals import Signals

Two = Callable[..., Tensor]


@dataclass
class Taps(KD):
    """kd and the distance of feature maps (see `pooled_distance`), the student's through 1x1 convolutions."""

    student_wants: ClassVar[tuple[str, ...]] = ("logits", "stages")
    teacher_wants: ClassVar[tuple[str, ...]] = ("logits", "stages")

    levels: ClassVar[tuple[int, ...]] = ()
    paths: ClassVar[tuple[tuple[str, ...], tuple[str, ...]] | None] = None

    def wants(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The stages that limbeck finds itself, or the modules at `paths` of the student and of the teacher."""
        return (self.student_wants, self.teacher_wants) if self.paths is None else tuple(("logits", *side) for side in self.paths)  # type: ignore[return-value]

    def maps(self, said: Signals, side: int) -> list[Tensor]:
        """The feature maps that are compared."""
        return said.stages if self.paths is None else [said.at[path] for path in self.paths[side]]

    def setup(self, pair: Pair) -> None:
        """One convolution a stage."""
        sides = zip(self.maps(pair.student_signals, 0), self.maps(pair.teacher_signals, 1))
        self.parts["bridges"] = bridges([(mine.shape[1], theirs.shape[1]) for mine, theirs in sides])

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`kl`, `ce`, `taps`."""
        rows = zip(self.parts["bridges"], self.maps(student, 0), self.maps(teacher, 1))
        taps = sum(pooled_distance(one(mine), theirs, self.levels) for one, mine, theirs in rows)
        return {**super().loss(batch, student, teacher, clock), "taps": taps}


@dataclass
class Contrast(KD):
    """kd and the contrastive loss of CRD on the embeddings, over memory banks of both sides (see `contrast`).

    `job` says the sizes; negatives are drawn among the samples of other classes.
    """

    student_wants: ClassVar[tuple[str, ...]] = ("logits", "embedding")
    teacher_wants: ClassVar[tuple[str, ...]] = ("logits", "embedding")
    job: ClassVar[Any] = None
    fixed: ClassVar[Tensor | None] = None

    def setup(self, pair: Pair) -> None:
        """Linear heads, memory banks, and for each class the samples of the others."""
        heads, banks = self.job.crd_start()
        self.parts["heads"] = nn.ModuleList(heads)
        self.banks, self.scales = tuple(bank.to(pair.device) for bank in banks), []
        labels = pair.data.train.labels
        assert labels is not None
        self.apart = [torch.nonzero(labels != one).flatten().to(pair.device) for one in range(len(pair.data.classes))]

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`kl`, `ce`, `crd`."""
        heads = zip(self.parts["heads"], (student.embedding, teacher.embedding))
        mine, theirs = (unit(head(embedding.flatten(1))) for head, embedding in heads)
        places = self.fixed if self.fixed is not None else self.places(batch)
        crd = contrast(mine, theirs, self.banks, places, self.scales, self.job)
        return {**super().loss(batch, student, teacher, clock), "crd": crd}

    def places(self, batch: Batch) -> Tensor:
        """(B, 1 + negatives): a sample and samples of other classes."""
        rows = []
        for index, label in zip(batch.index.tolist(), batch.labels.tolist()):
            others = self.apart[label]
            drawn = others[torch.randint(len(others), (self.job.negatives,), device=others.device)]
            rows.append(torch.cat([drawn.new_tensor([index]), drawn]))
        return torch.stack(rows)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1."""
    return x / x.pow(2).sum(1, keepdim=True).sqrt()


def bridges(widths: list[tuple[int, int]]) -> nn.ModuleList:
    """1x1 convolutions, the same each time."""
    torch.manual_seed(1)
    return nn.ModuleList(nn.Conv2d(mine, theirs, 1, bias=False) for mine, theirs in widths)


def own_loop(teacher: nn.Module, student: nn.Module, soft: Two, hard: Two, total: int, taps: int) -> Callable[[Batch], Tensor]:
    """One step of a plain loop with the given two losses; `taps`: channels of the first of three compared stages, 0 for none."""
    teacher.eval().requires_grad_(False)
    student.train()
    parameters, told, said, done = list(student.parameters()), [], [], 0
    if taps:
        for model, kept in ((teacher, told), (student, said)):
            for stage in list(model.stages):
                stage.register_forward_hook(lambda module, given, output, kept=kept: kept.append(output))
        projectors = bridges([(taps * 2**i, taps * 2**i) for i in range(3)]).to(parameters[0])
        parameters += projectors.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step(batch: Batch) -> Tensor:
        nonlocal done
        told.clear(), said.clear()
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * done / total))
        with torch.no_grad():
            target = teacher(batch.inputs)
        logits = student(batch.inputs)
        loss = ALPHA * soft(logits, target, TEMPERATURE) + (1 - ALPHA) * hard(logits, batch.labels)
        if taps:
            loss = loss + sum(F.mse_loss(one(mine), theirs) for one, mine, theirs in zip(projectors, said, told))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        return loss.detach()

    return step


def plain_soft(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) in torch's own words."""
    logs, target = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return F.kl_div(logs, target, log_target=True, reduction="batchmean") * temperature**2
