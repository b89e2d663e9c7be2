"""Other views of a batch: adversarial inputs, and accuracy under them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.data.batches import Batches
from limbeck.data.split import Split
from limbeck.errors import UserError
from limbeck.losses import cross_entropy
from limbeck.signals import call, logits_of
from limbeck.tasks import Classification


def pgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    noise: float = 0.001,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Projected gradient descent (Madry et al., arXiv:1706.06083): inputs near the given ones on which the model errs.

    x' = x + noise N(0, 1); then `steps` times x' = project(x' + step sign(grad CE(model(x'), y))),
    onto the ball of radius eps (maximum norm) and [low, high].

    Args:
        model: attacked in evaluation mode; every module's own mode is put back. No parameter's gradient is touched.
        inputs: `(B, ...)` floats in [low, high].
        labels: `(B,)`; samples labelled -1 are left near where they are.
        eps, step, noise: in units of the inputs.
        steps: how many.

    Returns:
        `(B, ...)` without gradient. The first noise is drawn from torch's global generator.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        moved = inputs.detach() + noise * torch.randn_like(inputs)
        for _ in range(steps):
            moved.requires_grad_(True)
            with torch.enable_grad():
                loss = cross_entropy(logits_of(call(model, moved)), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + step * gradient.sign()
            moved = torch.minimum(torch.maximum(moved, inputs - eps), inputs + eps).clamp(low, high)
        return moved.detach()
    finally:
        for module, mode in modes:
            module.training = mode


def check_box(inputs: Any, who: str) -> None:
    """Refuse inputs that an attack within [0, 1] would tear: anything but a floating-point tensor with values in that range.

    Raises:
        UserError: naming `who` attacks.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise UserError(
            f"{who} attacks inputs that are one tensor of floats",
            "use pictures or tables; token ids and several inputs cannot be moved a little",
        )
    if inputs.numel() and (float(inputs.min()) < -1e-6 or float(inputs.max()) > 1 + 1e-6):
        raise UserError(
            f"{who} attacks inputs in [0, 1]; here are values from {float(inputs.min()):.3g} to {float(inputs.max()):.3g}",
            "scale the data to [0, 1], and let the network normalise it",
        )


def robust_accuracy(
    network: nn.Module,
    split: Split,
    task: Classification,
    eps: float,
    step: float,
    steps: int,
    batch: int = 512,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> float:
    """Share of a split that the network still gets right under `pgd` on its own loss; the attack's noise comes from `seed`.

    Args:
        network: measured in evaluation mode.
        split: labelled samples.
        task: must be multiclass.
        eps, step, steps: of the attack.
        batch: samples at a time.
        device: where the network lives.
        seed: of the attack's first noise; the global generator is left as it was.
    """
    if task.kind != "multiclass":
        raise UserError(f"accuracy under attack is for multiclass tasks, this one is {task.kind}", "leave evaluation.attack out")
    right = total = 0
    was = network.training
    network.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part in Batches(split, batch, shuffle=False).epoch(0):
            part = part.to(device)
            assert part.labels is not None
            moved = pgd(network, part.inputs, part.labels, eps=eps, step=step, steps=steps)
            with torch.no_grad():
                guess = logits_of(call(network, moved)).argmax(-1)
            known = part.labelled
            right += int((guess == part.labels)[known].sum())
            total += int(known.sum())
    network.train(was)
    return right / max(total, 1)
