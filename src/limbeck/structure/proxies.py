"""What an untrained network says about how well it will learn: scores of one mini-batch, for searching without training.

Every score is of a network whose weights were drawn anew; larger is meant to be better.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.losses import similarity_preserving
from limbeck.signals import Reader, anatomy

_TINY = 1e-12


def gaussian(network: nn.Module) -> nn.Module:
    """A copy whose convolution and linear weights are drawn from N(0, 1) and whose biases are 0, as DisWOT has it; norms are the identity.

    Numbers come from torch's global generator.
    """
    made = copy.deepcopy(network)
    for module in made.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            nn.init.normal_(weight)
        elif isinstance(weight, nn.Parameter) and "norm" in type(module).__name__.lower():
            nn.init.ones_(weight)
        else:
            continue
        if isinstance(bias, nn.Parameter):
            nn.init.zeros_(bias)
    return made.requires_grad_(True).train()


@dataclass(frozen=True)
class Said:
    """What a network says about one mini-batch.

    Attributes:
        features: `(B, ...)` the last feature map before it is pooled.
        gradient: `(K, C)` the gradient of the cross-entropy with respect to the classifier's weight.
    """

    features: Tensor
    gradient: Tensor


def said(network: nn.Module, inputs: Tensor, labels: Tensor) -> Said:
    """Features and classifier gradient of a network as it is.

    Args:
        network: a classifier; its gradients are left empty.
        inputs: `(B, ...)`; labels: `(B,)`.

    Raises:
        UserError: its last layer is not linear.
    """
    found = anatomy(network, inputs)
    head = network.get_submodule(found.embedding) if found.embedding else None
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(network).__name__} does not end in a linear layer", "give a classifier such as convnet, cnn or resnet")
    read = Reader(network, ("logits", "stages[-1]"), anatomy=found)
    signals = read(inputs)
    loss = F.cross_entropy(signals.logits.float(), labels)
    (gradient,) = torch.autograd.grad(loss, [head.weight])
    read.close()
    return Said(signals.stages[-1].detach(), gradient.detach())


def semantic_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """sum_k |M_k^S - M_k^T|_F^2 / (C K), M_k = g_k g_k^T with rows of length 1, g_k the row of class k (DisWOT, arXiv 2303.15678).

    Args:
        student: `(K, C)` gradient of the classifier's weight; teacher: the same shape.

    Raises:
        UserError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise UserError(
            f"classifier gradients of shape {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared",
            "give teacher and candidates one width before the classifier (convnet's out), or use proxy: relation",
        )

    def channels(gradient: Tensor) -> Tensor:
        return F.normalize(gradient[:, :, None] * gradient[:, None, :], dim=2, eps=_TINY)

    return (channels(student) - channels(teacher)).square().sum() / student.numel()


def relation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """|G^S - G^T|_F^2 / B^2, G = F F^T of the flattened feature maps with rows of length 1; sizes of features may differ."""
    return similarity_preserving(student, teacher)


def code_overlap(network: nn.Module, inputs: Tensor) -> float:
    """log |det K_H|, K_H[i, j] the number of ReLUs on which samples i and j agree (Mellor et al. 2021, arXiv 2006.04647, "nwot").

    Raises:
        UserError: the network has no ReLU module.
    """
    codes: list[Tensor] = []
    layers = [module for module in network.modules() if isinstance(module, (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU))]
    if not layers:
        raise UserError(f"{type(network).__name__} has no activation modules", "use another proxy")
    handles = [layer.register_forward_hook(lambda m, args, out: codes.append((args[0] > 0).flatten(1).double())) for layer in layers]
    try:
        with torch.no_grad():
            network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    whole = torch.cat(codes, 1)
    return float(torch.linalg.slogdet(whole @ whole.T + (1 - whole) @ (1 - whole).T)[1])


def _gradients(network: nn.Module, loss: Tensor) -> list[tuple[Tensor, Tensor]]:
    weights = [p for p in network.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    return [(p.detach(), g) for p, g in zip(weights, grads) if g is not None]


def saliency(network: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """sum |w dL/dw| (Lee et al. 2019, arXiv 1810.02340, "snip")."""
    return float(sum((p * g).abs().sum() for p, g in _gradients(network, F.cross_entropy(network(inputs), labels))))


def gradient_norm(network: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Sum of the norms of all weights' gradients (Abdelfattah et al. 2021, arXiv 2101.08134)."""
    return float(sum(g.norm() for _, g in _gradients(network, F.cross_entropy(network(inputs), labels))))


def synaptic_flow(network: nn.Module, inputs: Tensor) -> float:
    """log of sum w dR/dw, R the sum of the outputs for an input of ones under |weights| (Tanaka et al. 2020, arXiv 2006.05467)."""
    made = copy.deepcopy(network).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.abs_()
    flow = made(torch.ones_like(inputs[:1], dtype=torch.float64)).sum()
    return float(torch.stack([(p * g).sum() for p, g in _gradients(made, flow)]).sum().abs().clamp_min(1e-300).log())


PROXIES = ("diswot", "semantic", "relation", "nwot", "snip", "grad-norm", "synflow", "params", "flops", "random")
"""By what candidates can be ranked; the last three need no network's outputs."""


def score(
    kind: str, student: nn.Module, teacher: nn.Module, batches: list[tuple[Tensor, Tensor]], cost: Callable[[nn.Module], dict[str, Any]]
) -> float:
    """How promising a candidate is; larger is better.

    Args:
        kind: one of `PROXIES` but "random". Those of DisWOT compare both networks with Gaussian weights, drawn anew for each batch; "nwot",
            "snip", "grad-norm" and "synflow" look at the candidate with its own first weights.
        student: the candidate, untrained. teacher: the network to be distilled.
        batches: `(inputs, labels)`, over which the score is averaged.
        cost: measures a network.
    """
    if kind in ("params", "flops"):
        return float(cost(student)[kind])
    values = []
    for inputs, labels in batches:
        if kind in ("diswot", "semantic", "relation"):
            own, other = said(gaussian(student), inputs, labels), said(gaussian(teacher), inputs, labels)
            value = 0.0
            if kind != "relation":
                value -= float(semantic_distance(own.gradient, other.gradient))
            if kind != "semantic":
                value -= float(relation_distance(own.features, other.features))
            values.append(value)
        else:
            network = copy.deepcopy(student).requires_grad_(True).train()
            values.append(
                code_overlap(network, inputs)
                if kind == "nwot"
                else saliency(network, inputs, labels)
                if kind == "snip"
                else gradient_norm(network, inputs, labels)
                if kind == "grad-norm"
                else synaptic_flow(network, inputs)
            )
    return sum(values) / len(values)
