"""The noise processes that the field uses, and how they are named."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from limbeck.diffusion.process import Process
from limbeck.errors import UserError, unknown


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
