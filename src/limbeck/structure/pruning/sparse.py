"""Training that makes batch-norm scales sparse, before channels are removed by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.knowledge.distiller import Distiller, Pair
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals


def norm_scales(network: nn.Module) -> list[nn.Parameter]:
    """The scales gamma of every batch norm, and of every group norm with one channel a group."""
    found = []
    for module in network.modules():
        single = isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels
        if (isinstance(module, nn.modules.batchnorm._BatchNorm) or single) and module.weight is not None:
            found.append(module.weight)
    return found


@dataclass
class SparseTraining(Distiller):
    """loss = hard loss + sum_c s_c(p) |gamma_c|, p the progress of this training.

    s_c = rate until p reaches `late`; from then on s_c = rate * `calm` for a share (p - late) / (1 - late) of the channels, the largest
    scales first, so that what will be kept can recover while the rest goes on to shrink.
    """

    card = Card(
        id="sparse-training",
        title="Learning Efficient Convolutional Networks through Network Slimming",
        year=2017,
        arxiv="1708.06519",
        wing="structure",
        family="pruning",
        claim="An L1 penalty on batch-norm scales marks the channels that can go.",
        equation="CE + s(p) sum |gamma|",
        baseline="alone",
        certainty="recalled",
    )
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    student_wants: ClassVar[tuple[str, ...]] = ("logits",)
    teacher_wants: ClassVar[tuple[str, ...]] = ()
    teacher_kind: ClassVar[str] = "none"

    rate: float = setting(1e-3, "s, weight of the sum of |gamma|", at_least=0)
    late: float = setting(0.5, "share of this training after which the rate begins to fall", at_least=0, at_most=1)
    calm: float = setting(0.1, "factor of the rate for the channels in which it has fallen", at_least=0, at_most=1)

    def setup(self, pair: Pair) -> None:
        """Find the scales."""
        self.gammas = norm_scales(pair.student)

    def rates(self, gamma: Tensor, progress: float) -> Tensor:
        """`(C,)` s_c of all scales `(C,)` at a progress in [0, 1]."""
        share = 0.0 if progress < self.late or self.late >= 1 else (progress - self.late) / (1 - self.late)
        rates = torch.full_like(gamma, self.rate)
        calmed = int(share * len(gamma))
        if calmed:
            rates[gamma.detach().abs().topk(calmed).indices] *= self.calm
        return rates

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`hard` and `sparsity`."""
        gamma = torch.cat(self.gammas)
        return {"hard": self.hard(batch, student.scores), "sparsity": (self.rates(gamma, clock.progress) * gamma.abs()).sum()}
