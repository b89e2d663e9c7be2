"""DHO: dual-head optimisation for semi-supervised distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.data.batches import Batches
from limbeck.engine.clock import Clock
from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.losses import forward_kl
from limbeck.method import Card, setting
from limbeck.signals import Reader, anatomy
from limbeck.signals.signals import Signals
from limbeck.zoo.dual_head import DualHeaded, TwoHeads, mix


@dataclass
class DHO(Distiller):
    """Two heads on one backbone: one sees only labels, the other only the teacher; their probabilities are mixed when predicting.

    loss = lam CE(ce(x_l), y) + (1 - lam) T^2 (KL(t || kd) over labelled + KL(t || kd) over unlabelled samples)
    p(x) = alpha softmax(ce(x)) + (1 - alpha) softmax(kd(x) / beta); alpha and beta are chosen on the validation split after training.
    Heads give (B, C). Half of each batch has labels.
    """

    card = Card(
        id="dho",
        title="Simple Semi-supervised Knowledge Distillation from Vision-Language Models via Dual-Head Optimization",
        year=2025,
        arxiv="2505.07675",
        wing="knowledge",
        family="semi-supervised",
        claim="Two heads avoid the conflict between labels and teacher in one classifier: "
        "state of the art on ImageNet with 1% and 10% of the labels.",
        equation="lam CE(ce(x_l), y) + (1 - lam) T^2 [KL(t||kd)_labelled + KL(t||kd)_unlabelled]",
        deviations="Labelled and unlabelled samples share one forward pass (the released code makes two), "
        "which matters to batch-norm statistics only. The heads are tuned once, after the last step.",
    )
    labelled_share: ClassVar[float | None] = 0.5
    _head: ClassVar[str] = "head"  # where the two heads are; each instance learns it in `wrap`

    temperature: float = setting(2.0, "T, released", above=0)
    lam: float = setting(0.5, "weight of the labels' loss; the teacher's gets 1 - lam (few-shot code)", at_least=0, at_most=1)
    alpha: float = setting(0.5, "weight of the label head when there is no validation split", at_least=0, at_most=1)
    beta: float = setting(1.0, "temperature of the teacher's head when there is no validation split", above=0)
    alpha_step: float = setting(0.05, "grid of alpha on the validation split", above=0, at_most=1)
    betas: tuple[float, ...] = setting((0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0), "grid of beta on the validation split", above=0)

    def wrap(self, student: nn.Module, example: Batch) -> nn.Module:
        """Two fresh heads in place of the student's own."""
        if isinstance(student, DualHeaded):
            self._put(student.head_path)
            return student
        found = anatomy(student, example.inputs)
        inputs = example.inputs
        shape = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else ()
        wrapped = DualHeaded.around(student, found.embedding, shape, _width(student, found.embedding))
        self._put(wrapped.head_path)
        return wrapped

    def _put(self, head: str) -> None:
        self.__dict__["_head"] = head

    def setup(self, pair: Pair) -> None:
        """Nothing to build; the loss needs one class of several."""
        self.check_one_class(pair)

    def wants(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The mixed output and both heads' own."""
        return ("logits", f"at:{self._head}.ce", f"at:{self._head}.kd"), ("logits",)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`ce`, `kd_labelled`, `kd_unlabelled`."""
        ce, kd = student.at[f"{self._head}.ce"], student.at[f"{self._head}.kd"]
        labelled = batch.labelled.to(kd.device)
        # each mean is one over the samples of its own kind in the whole batch, of which this may be a part
        weights = [(1 - self.lam) * batch.extra.get(scale, 1.0) for scale in ("labelled_scale", "unlabelled_scale")]
        return {
            "ce": self.lam * self.hard(batch, ce),
            "kd_labelled": weights[0] * forward_kl(kd, teacher.logits, mask=labelled, temperature=self.temperature),
            "kd_unlabelled": weights[1] * forward_kl(kd, teacher.logits, mask=~labelled, temperature=self.temperature),
        }

    @torch.no_grad()
    def finish(self, student: nn.Module, models: Models, data: Any) -> nn.Module:
        """Set alpha and beta: the first best pair on the validation split (beta the outer loop), or the settings when there is none."""
        heads = student.get_submodule(self._head)
        assert isinstance(heads, TwoHeads)
        alpha, beta = self.alpha, self.beta
        if data.valid is not None:
            ce, kd, labels = self._read(student, data.valid, heads.alpha.device)
            best = -1.0
            for b in self.betas:
                for step in range(round(1 / self.alpha_step) + 1):
                    a = min(1.0, step * self.alpha_step)
                    right = float((mix(ce, kd, a, b).argmax(1) == labels).float().mean())
                    if right > best:
                        best, alpha, beta = right, a, b
        heads.alpha.fill_(alpha)
        heads.beta.fill_(beta)
        return student

    def _read(self, student: nn.Module, split: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        reader = Reader(student, self.wants()[0][1:])
        student.eval()
        ce, kd, labels = [], [], []
        for batch in Batches(split, 512, shuffle=False).epoch(0):
            batch = batch.to(device)
            said = reader(batch.inputs)
            keep = batch.labelled.to(device)
            ce.append(said.at[f"{self._head}.ce"][keep])
            kd.append(said.at[f"{self._head}.kd"][keep])
            labels.append(batch.labels[keep])
        reader.close()
        return torch.cat(ce), torch.cat(kd), torch.cat(labels)


def _width(student: nn.Module, head: str) -> int:
    layer = student.get_submodule(head)
    return int(getattr(layer, "out_features", 0))
