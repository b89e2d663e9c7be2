"""Networks that read a noisy sample, its noise level and a label: what they share, and a fully connected one.

A denoiser says what a diffusion or flow model needs at a point (the noise, the clean sample, the velocity: the loss decides) and is
called `net(x, level, label)`. Every embedded one is twice differentiable and takes forward-mode derivatives (`torch.func.jvp`) with
respect to `x` and `level`; none has dropout or running statistics, so that the same inputs give the same bits in either mode.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.zoo.network import positive

FREQUENCIES = 16
"""Sines, and as many cosines, by which a level is told."""


class Condition(nn.Module):
    """The level and the label as one vector, which the blocks read through a linear layer each.

    `[level, sin(w level), cos(w level)]` for 16 angular frequencies w in geometric progression, then Linear-SiLU-Linear; the label's
    row of a table is added to it, and a SiLU follows. The frequencies are low on purpose: with the usual ones, up to thousands of
    radians a unit, a derivative with respect to the level is mostly noise (Lu and Song 2024, arXiv:2410.11081, section 4.1).

    Args:
        classes: how many labels there are besides the null label.
        dim: length of the vector.
        slowest, fastest: the lowest and the highest frequency in radians a unit of `level`.
        name: the network, for messages.

    Raises:
        UserError: a negative number of classes, or frequencies that are not 0 < slowest <= fastest.
    """

    frequencies: Tensor

    def __init__(self, classes: int, dim: int, slowest: float, fastest: float, name: str) -> None:
        super().__init__()
        if classes < 0:
            raise UserError(f"network {name!r} for {classes} classes", "give the number of labels, or 0 for none")
        if not 0 < slowest <= fastest < math.inf:
            raise UserError(f"network {name!r}: frequencies from {slowest} to {fastest}", "give 0 < slowest <= fastest, such as 0.2 and 4")
        self.classes = classes
        steps = torch.linspace(math.log(slowest), math.log(fastest), FREQUENCIES, dtype=torch.float64)
        # Made anew from the arguments, hence not stored: neither loading nor a moving average of the weights can alter it.
        self.register_buffer("frequencies", steps.exp().float(), persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES + 1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes + 1, dim)
        self.activation = nn.SiLU()

    def forward(self, level: Tensor, label: Tensor | None, batch: int) -> Tensor:
        """`(batch, dim)` from `level` (`(batch,)`, or one number for all) and `label` (`(batch,)` int64, or None: the null label)."""
        level = level.to(self.time[0].weight.dtype).expand(batch)[:, None]
        phase = level * self.frequencies
        told = self.time(torch.cat([level, phase.sin(), phase.cos()], 1))
        if label is None or not self.classes:
            return self.activation(told + self.label.weight[self.classes])
        return self.activation(told + self.label(label))


class DenoisingNetwork(nn.Module):
    """What every embedded denoiser is: `net(x, level, label)` gives a tensor like `x`, which is all zero before training.

    Args:
        input_shape: of one sample.
        classes: labels besides the null label; 0 for a network without labels, which ignores any that it is given.
        dim: length of the vector that tells level and label.
        slowest, fastest: see `Condition`.
        name: the network, for messages.

    Attributes:
        denoises: True, by which a denoiser is told from a classifier.
        input_shape: of one sample.
        classes: labels besides the null label.
        null_label: `classes`, the label that says nothing.
        taps: paths of the stages in order of depth; the output of each is a tensor of features.
        middle: path of the stage at half depth (the bottleneck of a U-Net); one of `taps`.
        limbeck_config: `{"ref", "args"}` by which `limbeck.zoo.build` makes it again; set by `build`.

    Raises:
        UserError: see `Condition`, or an empty shape.
    """

    denoises: bool = True
    plain_start: bool = False
    taps: tuple[str, ...]
    middle: str

    def __init__(self, input_shape: tuple[int, ...], classes: int, dim: int, slowest: float, fastest: float, name: str) -> None:
        super().__init__()
        self.input_shape = tuple(int(n) for n in input_shape)
        if not self.input_shape or min(self.input_shape) < 1:
            raise UserError(f"network {name!r} for samples of shape {self.input_shape}", "give sizes of at least 1")
        self.classes = self.null_label = classes
        self.condition = Condition(classes, dim, slowest, fastest, name)


def zeroed(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The same layer with weights and bias 0, so that what it ends starts as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualLayers(nn.Module):
    """`(B, D)` in and out: norm, scale and shift by the condition, Linear-SiLU-Linear around a shortcut; starts as the identity.

    Args:
        width: D, and the width between the two layers.
        dim: length of the condition.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = zeroed(nn.Linear(dim, 2 * width))
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), zeroed(nn.Linear(width, width)))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`x` `(B, D)` and `condition` `(B, dim)` to `(B, D)`."""
        scale, shift = self.modulate(condition).chunk(2, 1)
        return x + self.layers(self.norm(x) * (1 + scale) + shift)


class DenoisingMLP(DenoisingNetwork):
    """Residual fully connected layers over the flattened noisy sample, told of level and label, for small pictures and tables.

    `taps` are the blocks, `(B, width)` each; `middle` is the block that ends the first half. At the default sizes it has 0.37 M
    parameters on 8 x 8 digits; they are this package's own choice, made for seconds of training on a processor.

    Args:
        input_shape: of one sample, any number of axes.
        classes: labels besides the null label; 0 for none.
        width: of the layers and of the vector that tells level and label.
        depth: residual blocks.
        slowest, fastest: the lowest and the highest frequency by which the level is told, in radians a unit; see `Condition`.

    Raises:
        UserError: sizes below 1, a negative number of classes, frequencies out of order.
    """

    def __init__(
        self, input_shape: tuple[int, ...], classes: int, width: int = 192, depth: int = 2, slowest: float = 0.2, fastest: float = 4.0
    ) -> None:
        positive("denoising-mlp", width=width, depth=depth)
        super().__init__(input_shape, classes, width, slowest, fastest, "denoising-mlp")
        size = math.prod(self.input_shape)
        self.stem = nn.Linear(size, width)
        self.blocks = nn.ModuleList(ResidualLayers(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = zeroed(nn.Linear(width, size))
        self.taps = tuple(f"blocks.{i}" for i in range(depth))
        self.middle = self.taps[(depth - 1) // 2]

    def forward(self, x: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """A tensor like `x`.

        Args:
            x: `(B, *input_shape)`.
            level: `(B,)` noise level as the caller codes it, best within about -2..2.
            label: `(B,)` int64 in 0..classes, of which `classes` is the null label; None for the null label throughout.
        """
        condition = self.condition(level, label, len(x))
        h = self.stem(x.flatten(1))
        for block in self.blocks:
            h = block(h, condition)
        return self.out(self.norm(h)).view(x.shape)
