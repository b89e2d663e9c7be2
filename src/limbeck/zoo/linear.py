"""One linear layer: the smallest student, and the floor that any other must beat."""

from __future__ import annotations

import math

from torch import nn

from limbeck.zoo.network import Network


class Linear(Network):
    """Logistic regression over the flattened sample.

    Args:
        input_shape: of one sample, any number of axes.
        classes: logits.
    """

    plain_start = True

    def __init__(self, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__(nn.Flatten(), [nn.Identity()], nn.Identity(), math.prod(input_shape), classes)
