"""Samplers: from noise to data with a denoiser, deterministic by the state of a generator.

A sampler is a function `(denoiser, x, times, label, rng, options) -> x0`: `x` `(B, ...)` is the state at `times[0]`, `times` `(steps +
1,)` falls to the data end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.diffusion.denoiser import Denoiser
from limbeck.diffusion.process import Process, expand
from limbeck.errors import UserError, unknown

Watch = Callable[[Tensor, Tensor], None]
"""Told `(t, x0)` at every step: what the result would be if sampling stopped here."""


Source = torch.Generator | Sequence[torch.Generator] | None
"""Where a stochastic sampler's noise comes from: one stream, one a sample (so that batches change nothing), or torch's global one."""


def _noise(x: Tensor, rng: Source) -> Tensor:
    if isinstance(rng, Sequence):
        return torch.stack([torch.randn(x.shape[1:], generator=own, dtype=x.dtype) for own in rng]).to(x.device)
    return torch.randn(x.shape, generator=rng, dtype=x.dtype).to(x.device)


def _pairs(times: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
    for number in range(len(times) - 1):
        yield times[number].expand(len(x)), times[number + 1].expand(len(x)), number == len(times) - 2


def ddim_step(process: Process, x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
    """alpha_s x0 + sigma_s noise: along the straight line of constant prediction to time s (Song et al. 2020, arXiv:2010.02502)."""
    return process.diffuse(x0, noise, s)


def ddim(denoiser: Denoiser, x: Tensor, times: Tensor, label: Tensor | None, rng: Any, options: Mapping[str, Any], watch: Watch) -> Tensor:
    """DDIM; equals Euler for flow and EDM processes."""
    for t, s, last in _pairs(times, x):
        x0, noise = denoiser.parts(x, t, label)
        watch(t, x0)
        x = x0 if last else ddim_step(denoiser.process, x0, noise, s)
    return x


def euler(denoiser: Denoiser, x: Tensor, times: Tensor, label: Tensor | None, rng: Any, options: Mapping[str, Any], watch: Watch) -> Tensor:
    """Euler steps of dx/dt in the process's own time; the last step returns the prediction of the data."""
    for t, s, last in _pairs(times, x):
        x0, noise = denoiser.parts(x, t, label)
        watch(t, x0)
        x = x0 if last else x + expand(s - t, x) * denoiser.process.read("velocity", x0, noise, t)
    return x


def heun(denoiser: Denoiser, x: Tensor, times: Tensor, label: Tensor | None, rng: Any, options: Mapping[str, Any], watch: Watch) -> Tensor:
    """Heun's second-order steps, the last one plain (Karras et al. 2022, arXiv:2206.00364, algorithm 1): 2 steps - 1 calls."""
    process = denoiser.process
    for t, s, last in _pairs(times, x):
        x0, noise = denoiser.parts(x, t, label)
        watch(t, x0)
        if last:
            return x0
        slope = process.read("velocity", x0, noise, t)
        guess = x + expand(s - t, x) * slope
        x = x + expand(s - t, x) * (slope + denoiser.velocity(guess, s, label)) / 2
    return x


def ancestral(
    denoiser: Denoiser, x: Tensor, times: Tensor, label: Tensor | None, rng: Any, options: Mapping[str, Any], watch: Watch
) -> Tensor:
    """The posterior's mean and fresh noise: DDPM for `eta` 1, DDIM for 0 (Song et al. 2020, equation 16, for any process)."""
    process, eta = denoiser.process, float(options.get("eta", 1.0))
    for t, s, last in _pairs(times, x):
        x0, noise = denoiser.parts(x, t, label)
        watch(t, x0)
        if last:
            return x0
        low, high = process.sigma(s), process.sigma(t)
        ratio = process.alpha(t) / process.alpha(s).clamp_min(1e-12)
        fresh = eta * (low / high) * (high**2 - (ratio * low) ** 2).clamp_min(0).sqrt()
        kept = (low**2 - fresh**2).clamp_min(0).sqrt()
        x = expand(process.alpha(s), x) * x0 + expand(kept, x) * noise + expand(fresh, x) * _noise(x, rng)
    return x


def dpm(denoiser: Denoiser, x: Tensor, times: Tensor, label: Tensor | None, rng: Any, options: Mapping[str, Any], watch: Watch) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2), first order in the first and the last step."""
    process = denoiser.process
    before: tuple[Tensor, Tensor] | None = None
    for t, s, last in _pairs(times, x):
        x0 = denoiser.x0(x, t, label)
        watch(t, x0)
        if last:
            return x0
        step = process.log_snr(s) - process.log_snr(t)
        aim = x0
        if before is not None:
            old, old_step = before
            share = expand(step / (2 * old_step), x)
            aim = (1 + share) * x0 - share * old
        ratio = process.sigma(s) / process.sigma(t)
        x = expand(ratio, x) * x + expand(process.alpha(s) - process.alpha(t) * ratio, x) * aim
        before = (x0, step)
    return x


def renoise(
    denoiser: Denoiser, x: Tensor, times: Tensor, label: Tensor | None, rng: Any, options: Mapping[str, Any], watch: Watch
) -> Tensor:
    """Predict the data, add fresh noise of the next level, again (consistency sampling, Song et al. 2023, arXiv:2303.01469, algorithm
    1)."""
    for t, s, last in _pairs(times, x):
        x0 = denoiser.x0(x, t, label)
        watch(t, x0)
        x = x0 if last else denoiser.process.diffuse(x0, _noise(x, rng), s)
    return x


def jump(denoiser: Denoiser, x: Tensor, times: Tensor, label: Tensor | None, rng: Any, options: Mapping[str, Any], watch: Watch) -> Tensor:
    """Flow-map jumps with chosen randomness (TCD, Zheng et al. 2024, arXiv:2402.19159): jump to a level below the next one, then add noise.

    `eta` 0 jumps straight to the next time (deterministic), 1 goes down to the data and back, as `renoise` does.
    """
    process, eta = denoiser.process, float(options.get("eta", 0.3))
    for t, s, last in _pairs(times, x):
        x0, noise = denoiser.parts(x, t, label)
        watch(t, x0)
        if last:
            return x0
        below = process.at((1 - eta) * process.place(s).clamp(0, 1))
        x = ddim_step(process, x0, noise, below)
        if eta > 0:
            x = process.noisier(x, below, s, _noise(x, rng))
    return x


def from_noise(
    denoiser: Denoiser, x: Tensor, times: Tensor, label: Tensor | None, rng: Any, options: Mapping[str, Any], watch: Watch
) -> Tensor:
    """One call of a network that maps initial noise to data (`Denoiser.from_noise`)."""
    if len(times) != 2:
        raise UserError(
            f"a generator that maps noise to data at once cannot make {len(times) - 1} steps", "sample it with 1 step, or distil another"
        )
    start = torch.full((len(x),), denoiser.process.t_noise, device=x.device, dtype=x.dtype)
    end = torch.full_like(start, float(options.get("end", denoiser.process.t_data)))
    made = denoiser.from_noise(x / expand(denoiser.process.scale(times[0].expand(len(x))), x), end, label)
    watch(start, made)
    return made


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "ancestral": ancestral,
    "dpm++2m": dpm,
    "renoise": renoise,
    "jump": jump,
    "from-noise": from_noise,
}
"""Samplers by name."""


def _ignore(t: Tensor, x0: Tensor) -> None:
    pass


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    label: Tensor | None = None,
    *,
    steps: int = 1,
    sampler: str = "ddim",
    grid: str = "uniform",
    times: Tensor | None = None,
    rng: Source = None,
    watch: Watch = _ignore,
    **options: Any,
) -> Tensor:
    """`(B, ...)` samples from noise.

    Args:
        noise: `(B, ...)` standard normal.
        label: `(B,)` classes.
        steps, grid: the times, see `Process.times`.
        times: `(steps + 1,)` times instead of a grid.
        sampler: a name of `SAMPLERS`.
        rng: of the noise that a stochastic sampler adds, see `Source`.
        watch: told `(t, x0)` at every step.
        options: of the sampler (`eta`).

    Raises:
        UserError: an unknown sampler or grid, or a number of steps that it cannot make.
    """
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    for name in options:
        if name not in OPTIONS.get(sampler, ()):
            takes = " and ".join(OPTIONS.get(sampler, ())) or "no option"
            raise UserError(f"the sampler {sampler} has no option {name!r}", f"it takes {takes}")
    process = denoiser.process
    if times is None:
        times = process.times(steps, grid, device=noise.device)
    times = times.to(noise.device, noise.dtype)
    if isinstance(rng, Sequence) and len(rng) != len(noise):
        raise UserError(f"{len(rng)} streams of noise for {len(noise)} samples", "give one generator a sample, or a single one for all")
    first = times[0].expand(len(noise))
    x = expand(process.scale(first), noise) * noise
    return SAMPLERS[sampler](denoiser, x, times, label, rng, options, watch)


OPTIONS: dict[str, tuple[str, ...]] = {"ancestral": ("eta",), "jump": ("eta",), "from-noise": ("end",)}
"""What a sampler may be told beside its times."""


def evaluations(sampler: str, steps: int, guided: bool) -> int:
    """Network evaluations that a sample costs."""
    calls = 2 * steps - 1 if sampler == "heun" else steps
    return calls * (2 if guided else 1)
