"""GDD: a diffusion network becomes a one-step generator by an adversarial loss alone, most of it frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import schema
from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.losses import critic_loss, fooling_loss, gradient_penalty
from limbeck.method import Card, setting
from limbeck.sampling.critics import Heads
from limbeck.sampling.features import feature_network
from limbeck.sampling.few_step import FewStep, Pair, frozen
from limbeck.signals import Reader

SPARED = ("modulate", "norm", "condition", "emb", "shortcut")
"""Parts of a stage that always stay free: norms, embeddings and what they modulate, the weights of skips."""

ASKING = ("qkv", "to_q", "to_k", "to_v")
"""Projections of attention, here and in diffusers; free below `freeze` 2."""


class Projected(nn.Module):
    """Frozen features of pictures, and small heads on them (projected discriminator, Sauer et al. 2021, arXiv:2111.01007).

    Args:
        classifier: trained on other weights than the one that measures. shape: `(C, H, W)`. classes: 0 for none.
    """

    def __init__(self, classifier: nn.Module, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.random = nn.Conv2d(shape[0], 32, 3, stride=1, padding=1).requires_grad_(False)
        self._reader = Reader(classifier, ("embedding", "stages"))
        with torch.no_grad():
            widths = [f.shape[-1] if f.ndim == 2 else f.shape[1] for f in self.features(torch.zeros(2, *shape))]
        self.heads = Heads(widths, classes)

    def features(self, x: Tensor) -> list[Tensor]:
        """The classifier's stages and embedding, random local projections at two scales, and the pixels."""
        said = self._reader(x)
        local = self.random(x)
        return [*said.stages, said.embedding, local, F.avg_pool2d(local, 2), x.flatten(1)]

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.heads(self.features(x), label)


@dataclass
class GDD(FewStep):
    """No teacher output is imitated: the network at its highest noise level is a generator already, and an adversarial loss on real
    pictures brings it out. Large weights inside the stages stay as they are (`freeze` 1); norms, embeddings, skips, projections of
    attention (queries, keys, values), input and output learn.

    L_G = softplus(-D(x)), L_D = softplus(D(x)) + softplus(-D(real)) + gamma/2 |grad D(real)|^2 every 16 updates with weight 16.
    """

    card = Card(
        id="gdd",
        title="Diffusion Models Are Innate One-Step Generators",
        year=2024,
        wing="sampling",
        family="distribution",
        claim="State of the art on CIFAR-10 (FID 1.54) and FFHQ (0.85) with five million training images, most convolutions frozen.",
        equation="L_G = mean softplus(-D(G(z)));  gradients only to norms, embeddings, qkv, input and output",
        arxiv="2405.20750",
        baseline="noise-regression",
        deviations="features of a classifier of the same data, random projections and pixels instead of VGG and EfficientNet; one mean"
        "  over all logits instead of a sum over backbones; no adaptive augmentation",
    )
    one_step = True

    freeze: int = setting(
        1, "0: everything learns; 1: large weights of the stages are frozen (paper's GDD-I); 2: qkv too", at_least=0, at_most=2
    )
    lr_critic: float = setting(1e-3, "learning rate of the heads (measured on 8x8 digits; paper: 1e-4 on CIFAR-10)", above=0)
    gamma: float = setting(1e-4, "of the gradient penalty (paper: 1e-4); it is of the sum of all logits", at_least=0)
    every: int = setting(16, "critic updates between gradient penalties (paper: 16)", at_least=1)
    imitate: float = setting(0.0, "weight of an instance loss against stored teacher samples, which the paper argues against", at_least=0)

    def setup(self, pair: Pair) -> None:
        spec = schema.Model(
            model="convnet",
            args={"width": 16, "depth": 2, "norm": "instance"},
            train=schema.Schooling(epochs=10, batch=64, lr=2e-3, seed=1),
        )
        classifier = feature_network(spec, pair.pictures, pair.session).requires_grad_(False)
        self.parts["critic"] = Projected(classifier.cpu(), pair.pictures.shape, pair.classes)
        self._frozen = self.keep(pair.student.network, pair.student.taps()) if self.freeze else []

    def keep(self, network: nn.Module, stages: Sequence[str]) -> list[str]:
        """Freeze the large weights of the stages; returns their names."""
        found = []
        for path in stages:
            for name, parameter in network.get_submodule(path).named_parameters():
                spared = any(word in name for word in (SPARED if self.freeze > 1 else SPARED + ASKING))
                if parameter.ndim > 1 and not spared:
                    parameter.requires_grad_(False)
                    found.append(f"{path}.{name}")
        return found

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        heads = [p for p in self.parts.parameters() if p.requires_grad]
        return {
            "student": make_optimizer(pair.training, [p for p in pair.student.network.parameters() if p.requires_grad]),
            "critic": make_optimizer(pair.training, heads, lr=self.lr_critic),
        }

    def turns(self, clock: Clock) -> Sequence[str]:
        return ("student", "critic")

    def _draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        pair = self.pair
        labels = pair.labels(count)
        t = torch.full((count,), pair.student.process.t_noise, device=pair.device)
        scale = float(pair.student.process.scale(t[:1]))
        return pair.student.x0(scale * pair.noise(count), t, labels), labels

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        critic = self.parts["critic"]
        if turn == "student":
            x, labels = self._draw(len(batch))
            self.show(x, labels)
            with frozen(critic):
                terms = {"adversarial": fooling_loss(critic(x, labels))}
            if self.imitate:
                terms["instance"] = self.imitate * self._instance(len(batch))
            return terms
        with torch.no_grad():
            fake, labels = self._draw(len(batch))
        real, known = batch.inputs, batch.labels if self.pair.classes else None
        penalised = self.gamma > 0 and clock.step % self.every == 0
        if penalised:
            real = real.detach().requires_grad_(True)
        said = critic(real, known)
        terms = {"critic": critic_loss(said, critic(fake, labels))}
        if penalised:
            terms["penalty"] = self.gamma * self.every * gradient_penalty(said, real)
        return terms

    def _instance(self, count: int) -> Tensor:
        from limbeck.diffusion import sample

        pair = self.pair
        noise, labels = pair.noise(count), pair.labels(count)
        assert pair.teacher is not None
        aim = sample(pair.teacher, noise, labels, steps=8, sampler="heun", grid=pair.spec.grid)
        t = torch.full((count,), pair.student.process.t_noise, device=pair.device)
        scale = float(pair.student.process.scale(t[:1]))
        return F.mse_loss(pair.student.x0(scale * noise, t, labels), aim)

    def after_step(self, clock: Clock) -> None:
        network = self.pair.student.network
        for name in self._frozen:  # toggling requires_grad elsewhere must not free them
            network.get_parameter(name).requires_grad_(False)
