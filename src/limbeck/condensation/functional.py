"""Networks as functions of one flat vector of weights, so that any network can serve inside a matching objective."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck.errors import UserError


class Functional:
    """A network as `logits = functional(weights, x)` with all weights in one vector `(P,)`.

    Args:
        network: the architecture; it is copied and its own weights are not used. Parameters only: buffers stay those of the copy
            (BatchNorm uses the statistics of the batch, as in training mode).

    Attributes:
        size: P, the number of weights.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).train()
        self.names = [name for name, _ in self.network.named_parameters()]
        self.shapes = [p.shape for p in self.network.parameters()]
        self.sizes = [p.numel() for p in self.network.parameters()]
        self.size = sum(self.sizes)

    def flatten(self, network: nn.Module) -> Tensor:
        """`(P,)`: a detached copy of a network's weights, in the order of its parameters.

        Raises:
            UserError: the network has another architecture.
        """
        if [p.shape for p in network.parameters()] != self.shapes:
            raise UserError("the network's weights have other shapes than the inner network's", "use one architecture for both")
        return torch.cat([p.detach().reshape(-1) for p in network.parameters()])

    def unflatten(self, weights: Tensor) -> dict[str, Tensor]:
        """The vector's parts as tensors by parameter name (views, so gradients reach the vector)."""
        return {n: part.view(s) for n, part, s in zip(self.names, weights.split(self.sizes), self.shapes)}

    def __call__(self, weights: Tensor, x: Tensor) -> Tensor:
        """Logits `(B, K)`, differentiable in the weights `(P,)` and in `x`."""
        return functional_call(self.network, self.unflatten(weights), (x,))


def fresh(network: nn.Module) -> nn.Module:
    """Draw all weights of a network again, in place, from torch's global generator.

    Raises:
        UserError: a layer with weights has no `reset_parameters`, so it cannot be drawn again.
    """
    for name, module in network.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        if not hasattr(module, "reset_parameters"):
            raise UserError(
                f"the layer {name or type(module).__name__} of {type(network).__name__} cannot be initialised again",
                "give it a reset_parameters(), or choose an embedded network such as convnet",
            )
        module.reset_parameters()
    return network


def frozen(network: nn.Module) -> nn.Module:
    """The same network with gradients switched off for its weights (they still reach its input)."""
    return network.requires_grad_(False)
