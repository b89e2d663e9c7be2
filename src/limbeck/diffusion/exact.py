"""Data whose scores are known exactly: mixtures of round Gaussians. What samplers and losses are checked against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.diffusion.denoiser import Denoiser
from limbeck.diffusion.process import Process, expand


class Mixture:
    """p(x0) = sum_k w_k N(mean_k, std_k^2 I); component k stands for class k, or for the class that `classes` says.

    Args:
        means: `(K, ...)`. stds: `(K,)`, 0 for a point. weights: `(K,)`, equal if left out.
        classes: `(K,)` int64 class of each component (the samples of a labelled data set as points); left out: each its own.
    """

    def __init__(
        self, means: Tensor, stds: Tensor | Sequence[float] | float, weights: Tensor | None = None, classes: Tensor | None = None
    ) -> None:
        self.means = torch.as_tensor(means)
        self.classes = torch.arange(len(self.means), device=self.means.device) if classes is None else classes
        self.free = int(self.classes.max()) + 1
        self.stds = torch.as_tensor(stds, dtype=self.means.dtype).expand(len(self.means))
        self.weights = torch.full((len(self.means),), 1 / len(self.means), dtype=self.means.dtype) if weights is None else weights

    def sample(self, count: int, label: Tensor | None = None) -> Tensor:
        """`(count, ...)` exact samples, of the components `label` `(count,)` where it is given."""
        pick = torch.multinomial(self.weights, count, True) if label is None else label
        return self.means[pick] + expand(self.stds[pick], self.means) * torch.randn(count, *self.means.shape[1:], dtype=self.means.dtype)

    def log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """`(B,)` log p_t(x) of the diffused mixture, up to a constant that depends on t alone."""
        energy, _ = self._components(x, alpha, sigma, label)
        return energy.logsumexp(1)

    def _components(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        a, s = alpha[:, None], sigma[:, None]
        variance = (a * self.stds[None]) ** 2 + s**2
        flat, means = x.flatten(1), self.means.flatten(1)
        # |x - a m|^2 without a (B, K, D) tensor; in float64, because at low noise it is a small difference of large numbers
        wide, points, scale = flat.double(), means.double(), a.double()
        squared = wide.square().sum(1, keepdim=True) - 2 * scale * (wide @ points.T) + scale**2 * points.square().sum(1)
        distance = squared.clamp_min(0).to(x.dtype)
        energy = self.weights.log()[None] - 0.5 * distance / variance - 0.5 * flat.shape[1] * variance.log()
        if label is not None:
            own = (label[:, None] == self.classes) | (label >= self.free)[:, None]
            energy = energy.masked_fill(~own, -torch.inf)
        return energy, variance

    def x0(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """`(B, ...)` E[x0 | x_t = x]; the label K (the number of classes) means no condition."""
        energy, variance = self._components(x, alpha, sigma, label)
        share = energy.softmax(1)
        flat, means = x.flatten(1), self.means.flatten(1)
        # sum_k share_k (mean_k + gain_k (x - alpha mean_k)), without a (B, K, D) tensor
        gain = share * alpha[:, None] * self.stds[None] ** 2 / variance
        mean = (share - alpha[:, None] * gain) @ means + gain.sum(1, keepdim=True) * flat
        return mean.reshape(x.shape)


class ExactNetwork(nn.Module):
    """The network that a perfect training would give: the exact posterior mean of a mixture, as any kind of prediction.

    Args:
        mixture: the data. process, prediction: as a `Denoiser` will read it (with `code="time"`).
    """

    def __init__(self, mixture: Mixture, process: Process, prediction: str = "velocity") -> None:
        super().__init__()
        self.mixture, self.process, self.prediction = mixture, process, prediction

    def forward(self, x: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        process = self.process
        a, s = process.alpha(level), process.sigma(level)
        if self.prediction == "edm":  # it is fed the preconditioned state
            x = x * expand(a.clamp_min(1e-4) * ((s / a.clamp_min(1e-4)) ** 2 + 0.25).sqrt(), x)
        x0 = self.mixture.x0(x, a, s, label)
        noise = (x - expand(a, x) * x0) / expand(s, x).clamp_min(1e-12)
        return process.read(self.prediction, x0, noise, level)


def exact_denoiser(mixture: Mixture, process: Process, prediction: str = "velocity", classes: int = 0) -> Denoiser:
    """A `Denoiser` that knows the mixture exactly."""
    return Denoiser(ExactNetwork(mixture, process, prediction), process, prediction, classes=classes, code="time")
