"""Noise processes: how data becomes noise, and every exact conversion that follows from it.

One convention for all: `x_t = alpha(t) x0 + sigma(t) z` with `z ~ N(0, I)`; small t is data, large t is noise. Per-sample numbers (t,
alpha, sigma) have shape `(B,)` and are broadcast over the remaining axes of `(B, ...)` samples.

The noise level that all processes share is the angle `theta = atan2(sigma, alpha)` in [0, pi/2]: 0 is data, pi/2 pure noise. It is
finite everywhere, also where a log-SNR is not, so a state moves between processes through it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from limbeck.errors import UserError, unknown

PREDICTIONS = ("x0", "noise", "velocity", "v", "score", "edm")
"""What a network may predict: the data; the noise z; dx/dt along the probability-flow path; alpha z - sigma x0 (Salimans & Ho 2022,
arXiv:2202.00512); the score; or the raw output F of the preconditioned network of Karras et al. 2022 (arXiv:2206.00364)."""

SMALL = 1e-4
"""Where a conversion divides by alpha or sigma, it divides by at least this: at the very end of a process the other part is unknowable."""


def expand(t: Tensor, x: Tensor) -> Tensor:
    """`(B,)` numbers shaped for broadcasting over samples `(B, ...)`."""
    return t.reshape(-1, *(1,) * (x.ndim - 1))


class Process(ABC):
    """A Gaussian noise process.

    Attributes:
        name: as in recipes.
        t_data, t_noise: the ends of its time.
    """

    name: ClassVar[str]
    t_data: float
    t_noise: float

    @property
    def t_low(self) -> float:
        """The lowest time that a network is trained at, where grids that are not uniform end before the data."""
        return self.t_data

    # ---- what a process is ----

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """What the data is multiplied by at time t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The standard deviation of the noise at time t."""

    @abstractmethod
    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha / dt and d sigma / dt."""

    @abstractmethod
    def time_at(self, angle: Tensor) -> Tensor:
        """The time whose noise level is `angle`; clamped to the ends of the process."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Plain data from which `make_process` makes it again."""

    # ---- what follows ----

    def angle(self, t: Tensor) -> Tensor:
        """The noise level atan2(sigma, alpha) at time t, in [0, pi/2]."""
        return torch.atan2(self.sigma(t), self.alpha(t))

    def scale(self, t: Tensor) -> Tensor:
        """sqrt(alpha^2 + sigma^2): the standard deviation of x_t for data of unit variance; pure noise starts at `scale(t_noise) z`."""
        return torch.hypot(self.alpha(t), self.sigma(t))

    def log_snr(self, t: Tensor) -> Tensor:
        """Half the log signal-to-noise ratio, lambda = log(alpha / sigma); decreasing in t."""
        return self.alpha(t).clamp_min(1e-20).log() - self.sigma(t).clamp_min(1e-20).log()

    def position(self, t: Tensor) -> Tensor:
        """t moved linearly to [0, 1]: 0 data, 1 noise."""
        return (t - self.t_data) / (self.t_noise - self.t_data)

    def diffuse(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`(B, ...)` x_t = alpha(t) x0 + sigma(t) noise."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    def noisier(self, x: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """From x_s to x_t with s < t by adding fresh noise: alpha_t/alpha_s x_s + sqrt(sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2) noise."""
        ratio = self.alpha(t) / self.alpha(s).clamp_min(SMALL)
        added = (self.sigma(t) ** 2 - (ratio * self.sigma(s)) ** 2).clamp_min(0).sqrt()
        return expand(ratio, x) * x + expand(added, x) * noise

    # ---- conversions ----

    def parts(self, kind: str, value: Tensor, x: Tensor, t: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
        """Data and noise that a prediction stands for: `(x0, z)` with alpha x0 + sigma z = x.

        Args:
            kind: one of `PREDICTIONS`.
            value: the prediction `(B, ...)` at state `x` `(B, ...)` and time `t` `(B,)`.
            sigma_data: of the preconditioning "edm" (0.5 in Karras et al. 2022).
        """
        a, s = expand(self.alpha(t), x), expand(self.sigma(t), x)
        if kind == "v":
            size = a * a + s * s
            return (a * x - s * value) / size, (s * x + a * value) / size
        if kind == "velocity":
            da, ds = (expand(slope, x) for slope in self.slopes(t))
            size = a * ds - s * da
            return (ds * x - s * value) / size, (a * value - da * x) / size
        if kind == "score":
            kind, value = "noise", -s * value
        if kind == "noise":
            return (x - s * value) / a.clamp_min(SMALL), value
        if kind == "edm":
            ratio = s / a.clamp_min(SMALL)
            total = ratio**2 + sigma_data**2
            kind, value = "x0", (sigma_data**2 / total) * (x / a.clamp_min(SMALL)) + ratio * sigma_data / total.sqrt() * value
        if kind == "x0":
            return value, (x - a * value) / s.clamp_min(SMALL)
        raise unknown("kind of prediction", kind, PREDICTIONS)

    def read(self, kind: str, x0: Tensor, noise: Tensor, t: Tensor, sigma_data: float = 0.5) -> Tensor:
        """The prediction of a kind that stands for data `x0` and noise `noise` at time t; the inverse of `parts`."""
        a, s = expand(self.alpha(t), x0), expand(self.sigma(t), x0)
        if kind == "x0":
            return x0
        if kind == "noise":
            return noise
        if kind == "velocity":
            da, ds = (expand(slope, x0) for slope in self.slopes(t))
            return da * x0 + ds * noise
        if kind == "v":
            return a * noise - s * x0
        if kind == "score":
            return -noise / s.clamp_min(SMALL)
        if kind == "edm":
            ratio = s / a.clamp_min(SMALL)
            total = ratio**2 + sigma_data**2
            state = x0 + ratio * noise
            return (x0 - sigma_data**2 / total * state) * total.sqrt() / (ratio * sigma_data).clamp_min(SMALL)
        raise unknown("kind of prediction", kind, PREDICTIONS)

    def convert(self, source: str, target: str, value: Tensor, x: Tensor, t: Tensor, sigma_data: float = 0.5) -> Tensor:
        """One prediction as another, at the same state and time."""
        return self.read(target, *self.parts(source, value, x, t, sigma_data), t, sigma_data)

    # ---- times ----

    def times(self, steps: int, grid: str = "uniform", start: float | None = None, device: torch.device | str = "cpu") -> Tensor:
        """`(steps + 1,)` times from the noise end to the data end, for a sampler of so many steps.

        Args:
            grid: "uniform" in t; "log-snr" uniform in log(alpha/sigma) between angles that a sampler can tell apart; "karras"
                (rho = 7, uniform in the seventh root of sigma/alpha between 80 and 0.002 or the ends of the process, then the data end).
            start: the first time, for generators that begin elsewhere than at the noise end.
        """
        if steps < 1:
            raise UserError(f"a sampler of {steps} steps", "give at least 1")
        first = self.t_noise if start is None else float(start)
        if grid == "uniform":
            return self._uniform(first, steps, device)
        ends = self.angle(torch.tensor([first, self.t_low], dtype=torch.float64)).clamp(math.atan(0.002), math.atan(80.0)).tan()
        if grid == "karras":
            roots = torch.linspace(float(ends[0] ** (1 / 7)), float(ends[1] ** (1 / 7)), steps, dtype=torch.float64) ** 7
        elif grid == "log-snr":
            roots = torch.linspace(float(ends[0].log()), float(ends[1].log()), steps, dtype=torch.float64).exp()
        else:
            raise unknown("grid of times", grid, ("uniform", "karras", "log-snr"))
        inner = self.time_at(roots.atan())
        inner[0] = first
        return torch.cat([inner, inner.new_tensor([self.t_data])]).to(device, torch.float32)

    def _uniform(self, first: float, steps: int, device: torch.device | str) -> Tensor:
        return torch.linspace(first, self.t_data, steps + 1, dtype=torch.float64).to(device, torch.float32)

    def draw(self, count: int, law: str = "uniform", a: float = 0.0, b: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
        """`(count,)` random times from torch's global generator.

        Args:
            law: "uniform" between positions a and b; "logit-normal" in position with mean a and deviation b; "log-normal": log(sigma/alpha)
                normal with mean a and deviation b (Karras et al.: -1.2, 1.2); "u-shaped" with steepness a (Lee et al. 2024,
                arXiv:2405.20320: density proportional to e^(a t) + e^(a (1 - t)), a = 4).
        """
        if law == "log-normal":
            return self.time_at((torch.randn(count, device=device) * b + a).exp().atan())
        if law == "uniform":
            place = a + (b - a) * torch.rand(count, device=device)
        elif law == "logit-normal":
            place = torch.sigmoid(a + b * torch.randn(count, device=device))
        elif law == "u-shaped":
            u = torch.rand(count, device=device)
            u = torch.log1p(u * math.expm1(a)) / a if a else u
            place = torch.where(torch.rand(count, device=device) < 0.5, u, 1 - u)
        else:
            raise unknown("law of times", law, ("uniform", "logit-normal", "log-normal", "u-shaped"))
        return self.at(place)

    def at(self, place: Tensor) -> Tensor:
        """The time at places in [0, 1] of the process's own spread of times (for most processes `position`)."""
        return self.t_data + (self.t_noise - self.t_data) * place

    def place(self, t: Tensor) -> Tensor:
        """The inverse of `at`. Unlike `position`, which networks are told, it knows a flow's shift."""
        return self.position(t)
