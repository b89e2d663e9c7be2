"""Images recovered from trained networks: what SRe2L and its relatives share."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.losses.inversion import statistics_distance


class BatchStatistics:
    """Reads the mean and the biased variance of every BatchNorm layer's input while a network runs.

    Args:
        network: in evaluation mode; hooks stay on it until `close`.
        name: of the network, for messages.

    Raises:
        UserError: the network has no BatchNorm layer.
    """

    def __init__(self, network: nn.Module, name: str = "the network") -> None:
        self.network = network
        self.layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        if not self.layers:
            raise UserError(
                f"{name} ({type(network).__name__}) has no BatchNorm layer, and images are recovered from BatchNorm's statistics",
                "use a network with BatchNorm, for example {model: convnet, args: {norm: batch}} or {model: cnn}",
            )
        if any(layer.running_mean is None for layer in self.layers):
            raise UserError(f"{name} has BatchNorm layers without running statistics", "train it with track_running_stats=True")
        self._read: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles = [layer.register_forward_pre_hook(self._hook(number)) for number, layer in enumerate(self.layers)]

    def _hook(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            self._read[number] = (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))

        return hook

    def __call__(self, x: Tensor, first: float = 10.0) -> tuple[Tensor, Tensor]:
        """Logits `(B, K)`, and the distance of the batch's statistics from the stored ones (`statistics_distance`)."""
        self._read.clear()
        logits = self.network(x)
        means, variances = zip(*(self._read[number] for number in sorted(self._read)))
        layers = [self.layers[number] for number in sorted(self._read)]
        stored = [layer.running_mean for layer in layers], [layer.running_var for layer in layers]
        return logits, statistics_distance(means, variances, *stored, first=first)

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def crop_box(
    height: int, width: int, least: float, most: float = 1.0, ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random part whose area is a share in [least, most] and whose aspect is log-uniform in `ratio`.

    Ten tries, then the whole picture, as usual for this augmentation.
    """
    for _ in range(10):
        area = height * width * (least + float(torch.rand(())) * (most - least))
        aspect = math.exp(math.log(ratio[0]) + float(torch.rand(())) * math.log(ratio[1] / ratio[0]))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return int(torch.randint(height - tall + 1, ())), int(torch.randint(width - wide + 1, ())), tall, wide
    return 0, 0, height, width


def random_resized_crop(x: Tensor, least: float, most: float = 1.0) -> Tensor:
    """One random part of all pictures of a batch (the same box), enlarged to full size; differentiable.

    Args:
        x: `(B, C, H, W)`.
        least, most: share of the area.
    """
    top, left, tall, wide = crop_box(*x.shape[-2:], least, most)
    part = x[..., top : top + tall, left : left + wide]
    return F.interpolate(part, size=x.shape[-2:], mode="bilinear", align_corners=False)


def jitter(x: Tensor, most: int) -> Tensor:
    """All pictures rolled by the same 0 to `most` pixels down and to the right."""
    if not most:
        return x
    down, right = torch.randint(0, most + 1, (2,)).tolist()
    return x.roll((down, right), (-2, -1))


def random_flip(x: Tensor) -> Tensor:
    """Each picture mirrored with probability one half."""
    chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return torch.where(chosen, x.flip(-1), x)


def committee_weights(priors: dict[str, float], members: list[str], temperature: float) -> list[float]:
    """softmax(p / temperature) over the chosen members; p are accuracies in percent; equal weights without priors.

    Raises:
        UserError: priors are given and a member has none.
    """
    if not priors:
        return [1 / len(members)] * len(members)
    missing = [name for name in members if name not in priors]
    if missing:
        raise UserError(f"priors are given, but none for the teacher {missing[0]}", "give a percentage for each teacher, or none at all")
    return torch.tensor([priors[name] / temperature for name in members], dtype=torch.float64).softmax(0).tolist()
