"""Networks of the pairs that papers on distillation compare on CIFAR-100, in plain torch: wide residual, VGG, bottleneck, MobileNetV2, ViT.

Each has `stages` (a list of modules, shallow to deep), `pool` and `head`, and takes `(B, 3, 32, 32)`, the transformers `(B, 3, 224, 224)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import CLASSES, resnets
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """Stem, stages, pooling, head."""

    def __init__(self, stem: nn.Module, stages: list[nn.Module], width: int) -> None:
        super().__init__()
        self.stem, self.stages = stem, nn.Sequential(*stages)
        self.pool, self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.pool(self.stages(self.stem(x))))


def conv(given: int, made: int, size: int = 3, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    parts = [nn.Conv2d(given, made, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(made)]
    return nn.Sequential(*parts, *([act()] if act else []))


class Residual(nn.Module):
    """x + f(x), through a 1x1 convolution where the shapes differ."""

    def __init__(self, inner: nn.Module, given: int, made: int, stride: int, shortcut: bool = True) -> None:
        super().__init__()
        self.inner, self.same = inner, stride == 1 and given == made
        self.side = nn.Conv2d(given, made, 1, stride, bias=False) if shortcut and not self.same else None

    def forward(self, x: Tensor) -> Tensor:
        """The sum, or f(x) alone where shapes differ and there is no shortcut."""
        if self.same:
            return x + self.inner(x)
        return self.inner(x) if self.side is None else self.side(x) + self.inner(x)


def wide(depth: int, width: int) -> Net:
    """Wide residual network (Zagoruyko and Komodakis 2016, arXiv:1605.07146): three groups of (depth - 4) / 6 pre-activated blocks."""
    stages: list[nn.Module] = []
    now = 16
    for group in range(3):
        made, blocks = 16 * width * 2**group, []
        for number in range((depth - 4) // 6):
            stride = 2 if group and not number else 1
            inner = nn.Sequential(
                nn.BatchNorm2d(now), nn.ReLU(), nn.Conv2d(now, made, 3, stride, 1, bias=False),
                nn.BatchNorm2d(made), nn.ReLU(), nn.Conv2d(made, made, 3, 1, 1, bias=False),
            )  # fmt: skip
            blocks.append(Residual(inner, now, made, stride))
            now = made
        stages.append(nn.Sequential(*blocks))
    return Net(nn.Conv2d(3, 16, 3, 1, 1, bias=False), stages, now)


def vgg(counts: tuple[int, ...]) -> Net:
    """VGG with batch norm (Simonyan and Zisserman 2014, arXiv:1409.1556) as used on CIFAR: one stage a resolution, four halvings."""
    stages: list[nn.Module] = []
    now = 3
    for number, (count, made) in enumerate(zip(counts, (64, 128, 256, 512, 512))):
        parts: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
        for _ in range(count):
            parts.append(conv(now, made))
            now = made
        stages.append(nn.Sequential(*parts))
    return Net(nn.Identity(), stages, now)


def bottlenecks(counts: tuple[int, ...] = (3, 4, 6, 3)) -> Net:
    """ResNet-50 (He et al. 2015, arXiv:1512.03385) with a 3x3 stem for small pictures."""
    stages: list[nn.Module] = []
    now = 64
    for group, count in enumerate(counts):
        inside, blocks = 64 * 2**group, []
        for number in range(count):
            stride = 2 if group and not number else 1
            inner = nn.Sequential(conv(now, inside, 1), conv(inside, inside, 3, stride), conv(inside, 4 * inside, 1, act=None))
            blocks += [Residual(inner, now, 4 * inside, stride), nn.ReLU()]
            now = 4 * inside
        stages.append(nn.Sequential(*blocks))
    return Net(conv(3, 64), stages, now)


def mobile(half: float = 0.5) -> Net:
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381), half as wide, as in the literature on CIFAR-100; four stages."""
    plan = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    groups: list[list[nn.Module]] = [[], [], [], []]
    now, stage = 16, 0
    for grow, channels, count, first in plan:
        stage, made = stage + (first == 2), max(8, int(channels * half))
        for number in range(count):
            stride = first if not number else 1
            inner = nn.Sequential(
                conv(now, grow * now, 1, act=nn.ReLU6),
                conv(grow * now, grow * now, 3, stride, grow * now, nn.ReLU6),
                conv(grow * now, made, 1, act=None),
            )
            groups[stage].append(Residual(inner, now, made, stride, shortcut=False))
            now = made
    return Net(conv(3, 16), [nn.Sequential(*group) for group in groups], now)


class Transformer(nn.Module):
    """ViT with patches of 16 at 224 (Dosovitskiy et al. 2020, arXiv:2010.11929; widths of DeiT); its stages are groups of four layers."""

    def __init__(self, width: int, heads: int, layers: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.mark, self.places = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(0.02 * torch.randn(1, 197, width))
        make = lambda: nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)  # noqa: E731
        self.stages = nn.Sequential(*(nn.Sequential(*(make() for _ in range(4))) for _ in range(layers // 4)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.pool = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.mark.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.pool(self.norm(self.stages(x))[:, 0]))


@dataclass
class PairOf:
    """Two networks: how to make them, the side of a picture, samples of a batch on one core and on a GPU."""

    make: Callable[[], tuple[nn.Module, nn.Module]]
    size: int = 32
    batch: int = 16
    batch_gpu: int = 256


PAIRS = {
    "R32x4 to R8x4": PairOf(resnets),
    "WRN-40-2 to WRN-16-2": PairOf(lambda: (wide(40, 2), wide(16, 2))),
    "VGG13 to VGG8": PairOf(lambda: (vgg((2, 2, 2, 2, 2)), vgg((1, 1, 1, 1, 1)))),
    "R50 to MobileNetV2": PairOf(lambda: (bottlenecks(), mobile()), batch=8),
}
PAIRS_GPU = {"ViT-small to ViT-tiny": PairOf(lambda: (Transformer(384, 6), Transformer(192, 3)), size=224)}
