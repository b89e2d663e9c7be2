"""A classifier with two heads on one backbone, whose probabilities are mixed (DHO, arXiv:2505.07675)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import UserError


class TwoHeads(nn.Module):
    """Takes the place of a classifier head: `log(alpha softmax(ce(f)) + (1 - alpha) softmax(kd(f) / beta))`, shape `(B, C)`.

    Args:
        old: the linear head that is replaced; both new heads begin with its shape.
    """

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.ce = nn.Linear(old.in_features, old.out_features, device=old.weight.device)
        self.kd = nn.Linear(old.in_features, old.out_features, device=old.weight.device)
        self.register_buffer("alpha", torch.tensor(0.5, device=old.weight.device))
        self.register_buffer("beta", torch.tensor(1.0, device=old.weight.device))

    def forward(self, features: Tensor) -> Tensor:
        """Log-probabilities `(B, C)`."""
        return mix(self.ce(features), self.kd(features), self.alpha, self.beta)


def mix(ce: Tensor, kd: Tensor, alpha: Tensor | float, beta: Tensor | float) -> Tensor:
    """`log(alpha softmax(ce) + (1 - alpha) softmax(kd / beta))` for logits `(B, C)`, finite also at alpha 0 and 1."""
    mixed = alpha * ce.float().softmax(-1) + (1 - alpha) * (kd.float() / beta).softmax(-1)
    return mixed.clamp_min(torch.finfo(torch.float32).tiny).log()


class DualHeaded(nn.Module):
    """A network whose linear head was replaced by two heads.

    Args:
        input_shape, classes: of the inner network.
        network: its reference, see `limbeck.zoo.build`.
        args: its arguments.
        head: path of the head inside it.
    """

    def __init__(
        self, input_shape: tuple[int, ...], classes: int, network: str = "cnn", args: dict[str, Any] | None = None, head: str = "head"
    ) -> None:
        from limbeck.zoo.build import build

        super().__init__()
        self._adopt(build(network, **{"input_shape": tuple(input_shape), "classes": classes, **(args or {})}), head)

    def _adopt(self, network: nn.Module, head: str) -> None:
        self.network = network
        self.head_path = f"network.{head}"
        try:
            old = network.get_submodule(head)
        except AttributeError:
            old = None
        if not isinstance(old, nn.Linear):
            raise UserError(
                f"{head!r} of {type(network).__name__} is {type(old).__name__}, not a linear layer",
                "two heads need a network that ends in a linear layer",
            )
        network.set_submodule(head, TwoHeads(old))

    @classmethod
    def around(cls, network: nn.Module, head: str, input_shape: tuple[int, ...], classes: int) -> DualHeaded:
        """Give an existing network two fresh heads in place of the layer at `head`; its backbone is kept as it is."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt(network, head)
        inner = getattr(network, "limbeck_config", None)
        if inner is not None:
            args = {"input_shape": list(input_shape), "classes": classes, "network": inner["ref"], "args": inner["args"], "head": head}
            self.limbeck_config = {"ref": "zoo:dual-head", "args": args}
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the inner network returns; its logits are mixed log-probabilities."""
        return self.network(*args, **kwargs)
