"""Fully connected layers, for tables and small pictures."""

from __future__ import annotations

import math

from torch import nn

from limbeck.zoo.network import Network, positive


class MLP(Network):
    """Linear-ReLU stages over the flattened sample.

    Args:
        input_shape: of one sample, any number of axes.
        classes: logits.
        widths: outputs of each stage.
    """

    plain_start = True

    def __init__(self, input_shape: tuple[int, ...], classes: int, widths: tuple[int, ...] = (64, 64)) -> None:
        stages: list[nn.Module] = []
        size = math.prod(input_shape)
        for width in widths:
            positive("mlp", widths=width)
            stages.append(nn.Sequential(nn.Linear(size, width), nn.ReLU()))
            size = width
        super().__init__(nn.Flatten(), stages, nn.Identity(), size, classes)
