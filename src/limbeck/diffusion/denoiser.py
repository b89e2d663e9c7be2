"""A network together with what its numbers mean: process, prediction, time code, classes, guidance."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.diffusion.process import PREDICTIONS, Process, expand
from limbeck.errors import UserError, unknown

CODES = ("position", "log", "time")
"""How a network is told the noise level: t moved to [0, 1]; log(sigma/alpha)/4 as in EDM; or t as it is."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): f(none) + scale (f(c) - f(none)); scale 1 is none.

    Attributes:
        scale: a number, or `(B,)`.
        low, high: it acts only where sigma/alpha lies between them (Kynkaanniemi et al. 2024, arXiv:2404.07724).
    """

    scale: float | Tensor = 1.0
    low: float = 0.0
    high: float = math.inf

    @property
    def acts(self) -> bool:
        """Whether a second pass is needed."""
        return isinstance(self.scale, Tensor) or self.scale != 1.0


class Denoiser:
    """A network read through a noise process.

    Args:
        network: called as `network(x, level, label)`: `(B, ...)`, `(B,)`, `(B,)` int64 or None; gives `(B, ...)`.
        process: the process it was trained under.
        prediction: what it gives, one of `PREDICTIONS`.
        classes: number of classes; the label `classes` means no condition. 0 for an unconditional network.
        code: how the noise level is told to it, one of `CODES`.
        sigma_data: of the preconditioning of "edm" networks.
        guidance: applied whenever it is read.

    Attributes:
        calls: network evaluations so far, a guided one counts two.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        prediction: str = "velocity",
        *,
        classes: int = 0,
        code: str = "position",
        sigma_data: float = 0.5,
        guidance: Guidance = Guidance(),
    ) -> None:
        if prediction not in PREDICTIONS:
            raise unknown("kind of prediction", prediction, PREDICTIONS)
        if code not in CODES:
            raise unknown("code of the noise level", code, CODES)
        if guidance.acts and classes == 0:
            raise UserError("a network without classes cannot be guided", "set guidance to 1, or give a conditional network")
        self.network, self.own, self.process, self.prediction = network, process, process, prediction
        self.classes, self.code, self.sigma_data, self.guidance = classes, code, sigma_data, guidance
        self.calls = 0

    # ---- copies ----

    def _copy(self, **changes: Any) -> Denoiser:
        other = copy.copy(self)
        for name, value in changes.items():
            setattr(other, name, value)
        other.calls = 0
        return other

    def under(self, process: Process) -> Denoiser:
        """The same network read in the time and state of another process: equal noise levels, states rescaled (exact for linear
        processes)."""
        return self._copy(process=self.own if process == self.own else process)

    def with_network(self, network: nn.Module) -> Denoiser:
        """Another network of the same kind (a student, a fake score), unguided."""
        return self._copy(network=network, guidance=Guidance())

    def guided(self, scale: float | Tensor, low: float = 0.0, high: float = math.inf) -> Denoiser:
        """The same network under another guidance.

        Raises:
            UserError: it has no classes.
        """
        guidance = Guidance(scale, low, high)
        if guidance.acts and self.classes == 0:
            raise UserError("a network without classes cannot be guided", "set guidance to 1, or give a conditional network")
        return self._copy(guidance=guidance)

    def facts(self) -> dict[str, Any]:
        """Plain data that, with a network, makes it again (`from_facts`); guidance by a tensor is not kept."""
        scale = self.guidance.scale
        guided = [scale, self.guidance.low, None if math.isinf(self.guidance.high) else self.guidance.high]
        return {
            "process": self.own.facts(),
            "view": None if self.process is self.own else self.process.facts(),
            "prediction": self.prediction,
            "classes": self.classes,
            "code": self.code,
            "sigma_data": self.sigma_data,
            "guidance": [1.0, 0.0, None] if isinstance(scale, Tensor) else guided,
        }

    @staticmethod
    def from_facts(network: nn.Module, facts: dict[str, Any]) -> Denoiser:
        """A denoiser from a network and what `facts` gave."""
        from limbeck.diffusion.processes import make_process

        own = dict(facts)
        scale, low, high = own.pop("guidance", (1.0, 0.0, None))
        guidance = Guidance(scale, low, math.inf if high is None else high)
        view = own.pop("view", None)
        made = Denoiser(network, make_process(own.pop("process")), guidance=guidance, **own)
        return made if view is None else made.under(make_process(view))

    # ---- reading ----

    def own_state(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """State and time as the network's own process has them."""
        if self.process is self.own:
            return x, t
        own = self.own.time_at(self.process.angle(t))
        return expand(self.own.scale(own) / self.process.scale(t), x) * x, own

    def level(self, own: Tensor) -> Tensor:
        """What the network is told of a time of its own process."""
        if self.code == "position":
            return self.own.position(own)
        if self.code == "log":
            return -self.own.log_snr(own) / 4
        return own

    def _input(self, x: Tensor, own: Tensor) -> Tensor:
        if self.prediction != "edm":
            return x
        ratio = self.own.sigma(own) / self.own.alpha(own).clamp_min(1e-4)
        return x * expand(1 / (self.own.alpha(own).clamp_min(1e-4) * (ratio**2 + self.sigma_data**2).sqrt()), x)

    def inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is called with for a state `x` `(B, ...)` of `process` at time `t` `(B,)`: its input and its level."""
        x, own = self.own_state(x, t)
        return self._input(x, own), self.level(own)

    def raw(self, x: Tensor, t: Tensor, label: Tensor | None = None, level_time: Tensor | None = None) -> Tensor:
        """The network's own output, guided if guidance is set.

        Args:
            x: `(B, ...)` state of `process` at time `t` `(B,)`.
            label: `(B,)` classes, or None for no condition.
            level_time: the time that the network is told, if it is another one than t (generators that stand at pure noise and are told
                how far to go).
        """
        x, own = self.own_state(x, t)
        told = own if level_time is None else self.own_state(x, level_time)[1]
        state, level = self._input(x, own), self.level(told)
        if not self.guidance.acts or label is None:
            self.calls += 1
            return self.network(state, level, label)
        null = torch.full_like(label, self.classes)
        self.calls += 2
        both = self.network(torch.cat([state, state]), torch.cat([level, level]), torch.cat([label, null]))
        given, free = both.chunk(2)
        scale = torch.as_tensor(self.guidance.scale, device=x.device, dtype=x.dtype).expand(len(x))
        if self.guidance.low > 0 or self.guidance.high < math.inf:
            angle = self.own.angle(own)  # not its tangent, which is negative where pi/2 is rounded up
            inside = (angle >= math.atan(self.guidance.low)) & ((angle <= math.atan(self.guidance.high)) | math.isinf(self.guidance.high))
            scale = torch.where(inside, scale, torch.ones_like(scale))
        return free + expand(scale, x) * (given - free)

    def parts(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data and noise `(x0, z)` that the network sees in a state `x` `(B, ...)` at time `t` `(B,)`."""
        value = self.raw(x, t, label)
        state, own = self.own_state(x, t)
        return self.own.parts(self.prediction, value, state, own, self.sigma_data)

    def read(self, kind: str, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The network's view as a prediction of any kind, in the process it is read in."""
        return self.process.read(kind, *self.parts(x, t, label), t, self.sigma_data)

    def x0(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The clean sample it sees, `(B, ...)`."""
        return self.parts(x, t, label)[0]

    def noise(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The noise it sees, `(B, ...)`."""
        return self.parts(x, t, label)[1]

    def velocity(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """dx/dt of the probability-flow path in `process`."""
        return self.read("velocity", x, t, label)

    def from_noise(self, noise: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """A sample made straight from initial noise, by a network that is told how far to go (time t) and never sees a half-done state.

        The output is read as at the noise end: for a flow network z - net(z, t), which for t = t_noise is its usual prediction.
        """
        end = torch.full_like(t, self.process.t_noise)
        x = expand(self.process.scale(end), noise) * noise
        value = self.raw(x, end, label, level_time=t)
        state, own = self.own_state(x, end)
        return self.own.parts(self.prediction, value, state, own, self.sigma_data)[0]

    def denoising_loss(self, x0: Tensor, noise: Tensor, t: Tensor, label: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Mean squared error of the network's own output type on noised data (x0 and "edm" networks with the weight of their own space).

        Args:
            x0, noise: `(B, ...)`; t: `(B,)` in `process`.
            weight: `(B,)`, or None for 1.
        """
        x = self.process.diffuse(x0, noise, t)
        value = self.raw(x, t, label)
        _, own = self.own_state(x, t)
        # data and noise are the same in every process; only a prediction's meaning depends on it
        target = self.own.read(self.prediction, x0, noise, own, self.sigma_data)
        error = (value - target).square().flatten(1).mean(1)
        return error.mean() if weight is None else (weight * error).mean()

    # ---- features ----

    def taps(self) -> tuple[str, ...]:
        """Module paths of the network's stages, for critics on its features.

        Raises:
            UserError: it does not name them.
        """
        found = getattr(self.network, "taps", ())
        if not found:
            raise UserError(f"{type(self.network).__name__} names no stages", "give it an attribute `taps`: module paths in order of depth")
        return tuple(found)

    def features(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, paths: Sequence[str] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Outputs of stages, and the raw output of the same unguided pass.

        Args:
            paths: module paths; None for all of `taps()`.
        """
        paths = self.taps() if paths is None else tuple(paths)
        plain = self._copy(guidance=Guidance())
        with _tapped(self.network, paths) as found:
            out = plain.raw(x, t, label)
        self.calls += 1
        return [found[path] for path in paths], out


@contextmanager
def _tapped(network: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[path] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [network.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
