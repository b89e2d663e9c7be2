"""Norm and direction (KD++): the student's embedding grows along the teacher's class mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.data.batches import Batches
from limbeck.data.data import Data
from limbeck.engine.clock import Clock
from limbeck.knowledge.distiller import Distiller, Pair
from limbeck.losses import norm_and_direction
from limbeck.method import Card, setting
from limbeck.signals import Reader, Signals
from limbeck.tasks import Classification


@dataclass
class ND(Distiller):
    """A class's mean embedding is a good classifier by itself; the student is drawn along it until it is as long as the teacher.

    c_k is the mean of the teacher's embeddings t over the training samples labelled k, un-augmented, computed once; e_k = c_k / |c_k|.
    Embeddings are what goes into the classifier: s (B, D_s), t (B, D_t); an adapter brings s to D_t for this term when the widths differ.

    loss = cls * CE(s_logits, y) + min(1, epoch / warm_up) * kd * T^2 KL(softmax(t_logits / T) || softmax(s_logits / T))
           + nd * mean_b (1 - <s, e_y> / max(|s|, |t|))
    Samples without label have no class mean to follow: they take part in the KL only.
    """

    card = Card(
        id="nd",
        title="Improving Knowledge Distillation via Regularizing Feature Norm and Direction",
        year=2023,
        arxiv="2305.17007",
        wing="knowledge",
        family="response",
        claim="Drawing embeddings along the teacher's class means, to its norm, improves KD and its kin on CIFAR-100, ImageNet and COCO.",
        equation="cls CE + min(1, epoch/warm_up) kd T^2 KL + nd mean(1 - <s, e_y> / max(|s|, |t|)), e_y = unit class mean of the teacher",
        baseline="kd",
        certainty="verified-in-code",
        deviations="KD++ only: the same term on DKD, DIST and ReviewKD is not offered. Class means are kept in full precision "
        "(the release rounds them to four decimals).",
    )
    student_wants = ("logits", "embedding")
    teacher_wants = ("logits", "embedding")

    temperature: float = setting(4.0, "T of the KL term", above=0)
    cls: float = setting(1.0, "weight of the labels", at_least=0)
    kd: float = setting(1.0, "weight of the KL term once it is warm; the paper has 1 to 3.5, by pair", at_least=0)
    nd: float = setting(2.0, "weight of the norm-and-direction term; the paper has 0.5 to 2 with KD, by pair", at_least=0)
    warm_up: int = setting(20, "epochs in which the KL term grows from nothing; the paper trains for 240", at_least=0)
    dropout: float = setting(0.5, "share that is dropped in the adapter, which is there only when the widths differ", at_least=0, at_most=1)

    def setup(self, pair: Pair) -> None:
        """Class means of the teacher `(C, D_t)` by one pass over the training split; an adapter when the widths differ."""
        self.check_one_class(pair)
        self._teacher = pair.teacher
        mine, other = pair.student_signals.embedding.shape[1], pair.teacher_signals.embedding.shape[1]
        if mine != other:
            linear = nn.Linear(mine, other)
            nn.init.zeros_(linear.bias)
            self.parts["adapter"] = nn.Sequential(nn.BatchNorm1d(mine), nn.Dropout(self.dropout), linear)
        sums = torch.zeros(pair.classes, other, dtype=torch.float64)
        plain = pair.data.train.with_augment(None)
        for batch in Batches(plain, min(512, len(plain)), shuffle=False).epoch(0):
            said = pair.teacher(batch.to(pair.device)).embedding
            known = batch.labelled.cpu()
            if bool(known.any()):
                sums.index_add_(0, batch.labels.cpu()[known], said.detach().cpu()[known].double())
        # dividing by the counts would not change a direction
        self.state["directions"] = F.normalize(sums, dim=1).float().to(pair.device)

    def _adapted(self, embedding: Tensor) -> Tensor:
        return self.parts["adapter"](embedding) if "adapter" in self.parts else embedding

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`ce`, `kl` (its weight is 0 in the first epoch) and `nd`."""
        warm = min(1.0, clock.epoch / self.warm_up) if self.warm_up else 1.0
        known = batch.labelled.to(student.logits.device)
        directions = self.state["directions"].to(student.logits.device)[batch.labels.clamp_min(0)]
        drawn = norm_and_direction(self._adapted(student.embedding), directions, teacher.embedding.norm(dim=1), mask=known)
        return {
            "ce": self.cls * self.hard(batch, student.logits),
            "kl": warm * self.kd * self.task.soft_loss(student.logits, teacher.logits, self.temperature),
            "nd": self.nd * drawn * batch.extra.get("labelled_scale", 1.0),
        }

    @torch.no_grad()
    def figures(self, student: nn.Module, data: Data, task: Classification, device: torch.device) -> dict[str, float]:
        """On the test split: `norm_ratio` |s| / |t|, `direction` cos(s, e_y), `projection` <s, e_y> / |t|; none for stored teachers."""
        if not self._teacher.networks():
            return {}
        read = Reader(student.eval(), ("embedding",), grad=False)
        self.parts.eval()
        rows = [torch.zeros(0, 3)]
        for batch in Batches(data.test, 512, shuffle=False).epoch(0):
            batch = batch.to(device)
            e = self.state["directions"].to(device)[batch.labels.clamp_min(0)]
            s, size = self._adapted(read(batch.inputs).embedding), self._teacher(batch).embedding.norm(dim=1)
            along, length = (s * e).sum(1), s.norm(dim=1)
            rows.append(torch.stack([length / size, along / length, along / size], 1)[batch.labelled].cpu())
        read.close()
        return dict(zip(("norm_ratio", "direction", "projection"), torch.cat(rows).mean(0).tolist()))
