"""MEAL V2: an ensemble's soft labels and a small discriminator on final logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.knowledge.distiller import Distiller, Pair
from limbeck.knowledge.reversal import reverse_gradient
from limbeck.losses import soft_cross_entropy
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals


@dataclass
class MEALV2(Distiller):
    """Fine-tune an ordinarily trained student on the mean probabilities of an ensemble alone: no labels, no features, no weight decay.

    loss = CE(mean_k softmax(t_k), s) + BCE(D([s; mean_k t_k]), [student; teacher])
    Logits are (B, C). D is a small network on one sample's logits: C -> C/K -> C/K/K -> 2.
    Start the student with `student.train` in the recipe.
    """

    card = Card(
        id="meal-v2",
        title="MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks",
        year=2020,
        arxiv="2009.08453",
        wing="knowledge",
        family="ensemble",
        claim="Soft labels of an ensemble, a good start and a discriminator "
        "lift a vanilla ResNet-50 to 80.67% on ImageNet, above training on labels.",
        equation="CE(mean_k softmax(t_k), softmax(s)) + BCE(D([s; mean_k t_k]))",
        baseline="alone",
        deviations="The released discriminator ends in a ReLU, which can die; it is a setting, off by default. "
        "In the released code student and discriminator minimise the same loss; "
        "`adversarial` puts a gradient reversal between them, as the paper's text has it.",
    )

    reduction: int = setting(4, "K, how much narrower each layer of D is; 8 for 1000 classes in the paper, 4 for few", at_least=2)
    discriminator: float = setting(1.0, "weight of D's loss; the paper uses 1", at_least=0)
    discriminator_lr: float | None = setting(
        None, "D's own learning rate; None is the student's, as the released code has it in effect", above=0
    )
    adversarial: bool = setting(False, "reverse the gradient between the student and D (the paper's text; the released code does not)")
    reversal: float = setting(1.0, "strength of the reversed gradient", at_least=0)
    final_relu: bool = setting(False, "end D with a ReLU, as the released code does")

    def setup(self, pair: Pair) -> None:
        """The discriminator."""
        self.check_one_class(pair)
        classes = pair.student_signals.logits.shape[-1]
        first = max(2, classes // self.reduction)
        second = max(2, first // self.reduction)
        layers: list[nn.Module] = [nn.Linear(classes, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 2)]
        self.parts["discriminator"] = nn.Sequential(*layers, nn.ReLU()) if self.final_relu else nn.Sequential(*layers)

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        """One optimiser, two groups: the student and D."""
        lr = self.discriminator_lr or pair.training.lr
        student = [p for p in pair.student.parameters() if p.requires_grad]
        return {"student": make_optimizer(pair.training, [{"params": student}, {"params": list(self.parts.parameters()), "lr": lr}])}

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`soft`, and `discriminator` unless its weight is 0."""
        terms = {"soft": soft_cross_entropy(student.logits, teacher.logits.float().softmax(-1))}
        if self.discriminator:
            members = [m.logits.float() for m in teacher.members.values()] or [teacher.logits.float()]
            s = reverse_gradient(student.logits.float(), self.reversal) if self.adversarial else student.logits.float()
            said = self.parts["discriminator"](torch.cat([s, torch.stack(members).mean(0)]))
            target = torch.zeros_like(said)
            target[: len(s), 0] = 1
            target[len(s) :, 1] = 1
            terms["discriminator"] = self.discriminator * nn.functional.binary_cross_entropy_with_logits(said, target)
        return terms
