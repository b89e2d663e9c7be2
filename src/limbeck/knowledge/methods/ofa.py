"""One-for-All: exits of the student answer in the space of logits, where every architecture speaks the same language."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.knowledge.distiller import Distiller, Pair
from limbeck.losses import target_enhanced_cross_entropy
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals
from limbeck.zoo.vit import TransformerBlock


@dataclass
class OFA(Distiller):
    """Features of a CNN, a transformer and an MLP do not compare; what small exits make of the student's features does: they are logits.

    Each chosen stage F_i of the student, (B, C, H, W), (B, L, D) or (B, D), gets an exit branch b_i, and every exit learns the teacher's
    final logits t (B, C). As a foreign teacher may mislead, the label is lifted before a power eps >= 1. Branches are thrown away.

    loss = gt * CE(s, y) + kd * ofa(s, t; eps_last) + ofa * sum_i ofa(b_i(F_i), t; eps_i)
    ofa(s, t; eps) = -mean_b sum_c w log softmax(s / T),  w = (softmax(t / T) + y)^eps - y;  no T^2; for samples without label y = 0
    """

    card = Card(
        id="ofa",
        title="One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
        year=2023,
        arxiv="2310.19444",
        wing="knowledge",
        family="response",
        claim="Exits in the space of logits let any architecture teach any other: up to 8.0% on CIFAR-100 and 0.7% on ImageNet-1K.",
        equation="gt CE(s,y) + kd ofa(s,t) + ofa sum_i ofa(b_i(F_i),t), ofa = -sum_c ((p_t + y)^eps - y) log p_s",
        baseline="kd",
        certainty="verified-in-code",
        deviations="An exit is as wide as the student's last stage (the release: the wider of both, which needs the teacher's features); "
        "`width` changes it. Stages are those that the anatomy finds. Flat features, which the release does not have, get "
        "linear-BatchNorm-ReLU-linear. Label smoothing (0.1 in the release) is the recipe's.",
    )
    student_wants = ("logits", "stages")

    eps: float | tuple[float, ...] = setting(1.0, "power: one for all, or one an exit and a last for the logits; ImageNet: 1.5", at_least=1)
    temperature: float = setting(1.0, "T of the exits and of the logits, without T^2", above=0)
    gt: float = setting(1.0, "weight of the labels", at_least=0)
    kd: float = setting(1.0, "weight of the teacher at the student's logits", at_least=0)
    ofa: float = setting(1.0, "weight of the teacher at each exit", at_least=0)
    stages: tuple[int, ...] | None = setting(None, "stages with an exit, from 0, -1 is the last; none for all, as in the paper")
    variant: Literal["code", "paper"] = setting("code", "the power on all classes, as released, or on the label alone, as printed")
    width: int | None = setting(None, "features of an exit before its classifier; none for the last stage's", at_least=1)

    def setup(self, pair: Pair) -> None:
        """An exit for each chosen stage, in `parts`."""
        self.check_one_class(pair)
        found = pair.student_signals.stages
        wanted = range(len(found)) if self.stages is None else self.stages
        for number in wanted:
            if not -len(found) <= number < len(found):
                raise UserError(f"ofa: the student has no stage {number}", f"it has {len(found)}, from 0; `limbeck inspect` lists them")
        self._numbers = sorted({number % len(found) for number in wanted})
        count = len(self._numbers) + 1
        self._powers = self.eps if isinstance(self.eps, tuple) else (self.eps,) * count
        if len(self._powers) != count:
            raise UserError(f"ofa: eps has {len(self._powers)} numbers", f"give {count}: one for each exit and one for the logits")
        width = self.width or found[-1].shape[-1 if found[-1].ndim == 3 else 1]
        classes = pair.student_signals.logits.shape[-1]
        for number in self._numbers:
            self.parts[f"exit{number}"] = _branch(found[number], len(found) - 1 - number, width, classes)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`ce`, `kd` at the logits, and `exits`, their sum."""
        exits = [self.parts[f"exit{number}"](student.stages[number]) for number in self._numbers]
        at = [
            target_enhanced_cross_entropy(s, teacher.logits, batch.labels, eps=eps, temperature=self.temperature, variant=self.variant)
            for s, eps in zip([*exits, student.logits], self._powers)
        ]
        terms = {"ce": self.gt * self.hard(batch, student.logits), "kd": self.kd * at[-1]}
        return terms | {"exits": self.ofa * sum(at[1:-1], at[0])} if exits else terms


def _branch(feature: Tensor, below: int, width: int, classes: int) -> nn.Module:
    """The exit for a stage with `below` stages after it: features to logits `(B, classes)`."""
    if feature.ndim == 4:
        body, last = _separable(feature.shape[1], below, width), width
        layers: list[nn.Module] = [*body, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    elif feature.ndim == 3:
        last = feature.shape[2]
        layers = [_Tokens(feature.shape[1], last, max(below, 1))]
    else:
        layers, last = [nn.Flatten(), nn.Linear(feature[0].numel(), width), nn.BatchNorm1d(width), nn.ReLU()], width
    branch = nn.Sequential(*layers, nn.Linear(last, classes))
    for module in branch.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return branch


def _separable(channels: int, blocks: int, width: int) -> list[nn.Module]:
    """`blocks` times: half the resolution, twice the channels (`width` after the last); a 1x1 convolution when there is no block."""
    layers: list[nn.Module] = [] if blocks else [nn.Conv2d(channels, width, 1)]
    for number in range(blocks):
        wider = width if number == blocks - 1 else 2 * channels
        for stride, into, out in ((2, channels, channels), (1, channels, wider)):
            depthwise = nn.Conv2d(into, into, 3, stride, 1, groups=into, bias=False)
            layers += [depthwise, nn.Conv2d(into, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        channels = wider
    return layers


class _Tokens(nn.Module):
    """Tokens `(B, L, D)` to `(B, D)`: squares of four are merged down to 7 x 7, then transformer blocks, then class token or mean.

    One or two tokens beyond a square number are class tokens; they are not merged. A length that is near no square is left as it is.
    """

    def __init__(self, length: int, dim: int, blocks: int) -> None:
        super().__init__()
        self.extra = next((extra for extra in (0, 1, 2) if math.isqrt(max(length - extra, 0)) ** 2 == length - extra), None)
        side = 0 if self.extra is None else math.isqrt(length - self.extra)
        self.merges = nn.ModuleList()
        while side > 7 and side % 2 == 0:
            self.merges.append(nn.Sequential(nn.LayerNorm(4 * dim), nn.Linear(4 * dim, dim), nn.GELU()))
            side //= 2
        self.blocks = nn.Sequential(*(TransformerBlock(dim, 4 if dim % 4 == 0 else 1, 4) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        special, x = x[:, : self.extra or 0], x[:, self.extra or 0 :]
        for merge in self.merges:
            half = math.isqrt(x.shape[1]) // 2
            squares = x.unflatten(1, (half, 2, half, 2)).transpose(2, 3)  # (B, half, half, 2, 2, D)
            x = merge(squares.flatten(3).flatten(1, 2))
        x = self.blocks(torch.cat([special, x], 1))
        return x[:, 0] if self.extra else x.mean(1)
