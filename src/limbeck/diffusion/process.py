"""Noise processes: how data becomes noise, and every exact conversion that follows from it.

One convention for all: `x_t = alpha(t) x0 + sigma(t) z` with `z ~ N(0, I)`; small t is data, large t is noise. Per-sample numbers (t,
alpha, sigma) have shape `(B,)` and are broadcast over the remaining axes of `(B, ...)` samples.

The noise level that all processes share is the angle `theta = atan2(sigma, alpha)` in [0, pi/2]: 0 is data, pi/2 pure noise. It is
finite everywhere, also where a log-SNR is not, so a state moves between processes through it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
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


@dataclass(frozen=True)
class Flow(Process):
    """Rectified flow: x_t = (1 - t) x0 + t z, t in [0, 1] (Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747).

    Args:
        shift: k >= 1 moves grids and drawn times towards noise, t = k t' / (1 + (k - 1) t') (Esser et al. 2024, arXiv:2403.03206, for
            larger pictures).
    """

    shift: float = 1.0
    name: ClassVar[str] = "flow"
    t_data: ClassVar[float] = 0.0
    t_noise: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise UserError(f"a flow's shift is {self.shift}", "give a number above 0; 1 shifts nothing")

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time_at(self, angle: Tensor) -> Tensor:
        s, c = angle.sin(), angle.cos()
        return s / (s + c)

    def _uniform(self, first: float, steps: int, device: torch.device | str) -> Tensor:
        unshifted = first / (self.shift - (self.shift - 1) * first)
        place = torch.linspace(unshifted, 0.0, steps + 1, dtype=torch.float64)
        return self.at(place).to(device, torch.float32)

    def at(self, place: Tensor) -> Tensor:
        return self.shift * place / (1 + (self.shift - 1) * place)

    def place(self, t: Tensor) -> Tensor:
        return t / (self.shift - (self.shift - 1) * t)

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "shift": self.shift}


@dataclass(frozen=True)
class Trig(Process):
    """The trigonometric process x = cos(t) x0 + sin(t) z, t in [0, pi/2] (TrigFlow, Lu & Song 2024, arXiv:2410.11081, in units of
    sigma_data)."""

    name: ClassVar[str] = "trig"
    t_data: ClassVar[float] = 0.0
    t_noise: ClassVar[float] = math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:
        return t.cos()

    def sigma(self, t: Tensor) -> Tensor:
        return t.sin()

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -t.sin(), t.cos()

    def time_at(self, angle: Tensor) -> Tensor:
        return angle

    def angle(self, t: Tensor) -> Tensor:
        return t

    def facts(self) -> dict[str, Any]:
        return {"name": self.name}


@dataclass(frozen=True)
class Cosine(Process):
    """Variance preserving with a cosine schedule in continuous time: alpha = cos(pi t / 2), t in [0, 1] (Nichol & Dhariwal 2021,
    arXiv:2102.09672, without the offset)."""

    name: ClassVar[str] = "cosine"
    t_data: ClassVar[float] = 0.0
    t_noise: ClassVar[float] = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).cos()

    def sigma(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).sin()

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -self.sigma(t) * (math.pi / 2), self.alpha(t) * (math.pi / 2)

    def time_at(self, angle: Tensor) -> Tensor:
        return angle * (2 / math.pi)

    def facts(self) -> dict[str, Any]:
        return {"name": self.name}


@dataclass(frozen=True)
class EDM(Process):
    """Variance exploding in the coordinates of Karras et al. 2022 (arXiv:2206.00364): x = x0 + sigma z; time is sigma itself.

    Args:
        lowest, highest: levels between which a network was trained (0.002 and 80). Time 0 is the data.
    """

    lowest: float = 0.002
    highest: float = 80.0
    name: ClassVar[str] = "edm"
    t_data: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.lowest < self.highest:
            raise UserError(f"noise levels from {self.lowest} to {self.highest}", "give 0 < lowest < highest")

    @property
    def t_noise(self) -> float:  # type: ignore[override]
        return self.highest

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def time_at(self, angle: Tensor) -> Tensor:
        return angle.clamp(0, math.atan(self.highest)).tan()

    def _uniform(self, first: float, steps: int, device: torch.device | str) -> Tensor:
        return self.times(steps, "karras", first, device)  # nobody walks a variance-exploding process in equal steps of sigma

    def at(self, place: Tensor) -> Tensor:
        """Positions on the rho = 7 curve between the levels, so that uniform positions are the levels that a sampler visits."""
        low, high = self.lowest ** (1 / 7), self.highest ** (1 / 7)
        return (low + (high - low) * place) ** 7

    def position(self, t: Tensor) -> Tensor:
        low, high = self.lowest ** (1 / 7), self.highest ** (1 / 7)
        return (t.clamp_min(self.lowest) ** (1 / 7) - low) / (high - low)

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "lowest": self.lowest, "highest": self.highest}


@dataclass(frozen=True)
class Discrete(Process):
    """Variance preserving in N discrete steps (DDPM, Ho et al. 2020, arXiv:2006.11239): alpha^2 at step n is the running product of
    1 - beta.

    Times are real numbers from -1 (data) over 0 (the least noise) to N - 1; between whole steps log(alpha/sigma) is interpolated
    linearly, between -1 and 0 sigma is.

    Args:
        products: `alphas_cumprod`, `(N,)`, falling.
    """

    products: tuple[float, ...] = field(repr=False)
    name: ClassVar[str] = "ddpm"
    t_data: ClassVar[float] = -1.0

    def __post_init__(self) -> None:
        p = self.products
        if len(p) < 2 or any(not 0 < b < a < 1 for a, b in pairwise(p)):
            raise UserError("the products of 1 - beta must fall from below 1 to above 0", "give alphas_cumprod of a DDPM schedule")

    @classmethod
    def from_betas(cls, schedule: str = "linear", first: float = 1e-4, last: float = 0.02, steps: int = 1000) -> Discrete:
        """The usual schedules: "linear" betas (Ho et al. 2020), "scaled-linear" (Stable Diffusion: 0.00085 to 0.012), "cosine"
        (Nichol & Dhariwal 2021, with offset 0.008 and betas of at most 0.999)."""
        if schedule == "linear":
            betas = torch.linspace(first, last, steps, dtype=torch.float64)
        elif schedule == "scaled-linear":
            betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
        elif schedule == "cosine":
            place = torch.arange(steps + 1, dtype=torch.float64) / steps
            bar = ((place + 0.008) / 1.008 * math.pi / 2).cos() ** 2
            betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        else:
            raise unknown("schedule of betas", schedule, ("linear", "scaled-linear", "cosine"))
        return cls(tuple((1 - betas).cumprod(0).tolist()))

    @property
    def t_noise(self) -> float:  # type: ignore[override]
        return float(len(self.products) - 1)

    @property
    def t_low(self) -> float:
        return 0.0

    @cached_property
    def _lambdas(self) -> Tensor:
        p = torch.tensor(self.products, dtype=torch.float64)
        return 0.5 * (p.log() - (-p).log1p())

    def _half_log_snr(self, t: Tensor) -> Tensor:
        table = self._lambdas.to(t.device, t.dtype)
        low = t.detach().floor().clamp(0, len(table) - 2).long()
        return table[low] + (t - low) * (table[low + 1] - table[low])

    def sigma(self, t: Tensor) -> Tensor:
        inner = torch.sigmoid(-2 * self._half_log_snr(t.clamp_min(0))).sqrt()
        return inner * (t + 1).clamp(0, 1)

    def alpha(self, t: Tensor) -> Tensor:
        s = self.sigma(t)
        return torch.where(t >= 0, torch.sigmoid(2 * self._half_log_snr(t.clamp_min(0))).sqrt(), (1 - s * s).clamp_min(0).sqrt())

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """From lambda' between whole steps: alpha' = alpha sigma^2 lambda', sigma' = -sigma alpha^2 lambda'."""
        table = self._lambdas.to(t.device, t.dtype)
        low = t.floor().clamp(0, len(table) - 2).long()
        slope, a, s = table[low + 1] - table[low], self.alpha(t), self.sigma(t)
        first = self.sigma(torch.zeros_like(t))
        before = t < 0
        rise = torch.where(before, first, -s * a * a * slope)
        return torch.where(before, -s * first / a, a * s * s * slope), rise

    def time_at(self, angle: Tensor) -> Tensor:
        table = self._lambdas.to(angle.device, angle.dtype)
        target = -(angle.clamp(1e-6, math.pi / 2 - 1e-6)).tan().log()
        high = torch.searchsorted(-table, -target.detach().contiguous()).clamp(1, len(table) - 1)
        low = high - 1
        inner = (low + (target - table[low]) / (table[high] - table[low])).clamp(max=len(table) - 1)
        first = torch.sigmoid(-2 * table[0]).sqrt()
        return torch.where(target > table[0], (angle.sin() / first - 1).clamp(-1, 0), inner)

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "products": list(self.products)}


def make_process(facts: str | dict[str, Any]) -> Process:
    """A process from its name ("flow", "trig", "cosine", "edm", "ddpm", "ddpm-scaled", "ddpm-cosine") or from what `facts` gave.

    Raises:
        UserError: unknown names or arguments.
    """
    if isinstance(facts, str):
        facts = {"name": facts}
    own = dict(facts)
    name = own.pop("name", None)
    simple = {"flow": Flow, "trig": Trig, "cosine": Cosine, "edm": EDM}
    schedules = {
        "ddpm": {"schedule": "linear"},
        "ddpm-scaled": {"schedule": "scaled-linear", "first": 0.00085, "last": 0.012},
        "ddpm-cosine": {"schedule": "cosine"},
    }
    if name not in simple and name not in schedules:
        raise unknown("noise process", str(name), (*simple, *schedules))
    try:
        if name in simple:
            return simple[name](**own)
        if "products" in own:
            return Discrete(**{**own, "products": tuple(own["products"])})
        return Discrete.from_betas(**{**schedules[name], **own})
    except TypeError as error:
        raise UserError(f"the noise process {name}: {error}", "`limbeck show` and docs/sampling.md list the arguments") from None
