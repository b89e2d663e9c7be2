"""What methods share that follow the teacher's paths: stored pairs of noise and sample, one step of its solver."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.diffusion import Denoiser, expand, sample
from limbeck.sampling.few_step import Pair
from limbeck.sampling.generator import Generator


class TeacherPairs:
    """Noise and the teacher's samples from it, made once when a run begins (again, with the same bits, when it is resumed).

    Args:
        count: pairs. steps: Heun steps of the (guided) teacher for each.
    """

    def __init__(self, pair: Pair, count: int, steps: int) -> None:
        assert pair.teacher is not None
        rng = torch.Generator().manual_seed(pair.seed + 77)
        labels = torch.randint(pair.classes, (count,), generator=rng) if pair.classes else None
        noises, aims = [], []
        for first in range(0, count, 512):
            here = slice(first, min(first + 512, count))
            noise = torch.randn(here.stop - here.start, *pair.pictures.shape, generator=rng).to(pair.device)
            own = None if labels is None else labels[here].to(pair.device)
            aims.append(sample(pair.teacher, noise, own, steps=steps, sampler="heun", grid=pair.spec.grid))
            noises.append(noise)
        self.noise, self.aim = torch.cat(noises), torch.cat(aims)
        self.labels = None if labels is None else labels.to(pair.device)

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """`count` random pairs `(noise, sample, labels)` from torch's global generator."""
        pick = torch.randint(len(self.noise), (count,)).to(self.noise.device)
        return self.noise[pick], self.aim[pick], None if self.labels is None else self.labels[pick]


@torch.no_grad()
def solver_step(teacher: Denoiser, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, order: int = 1) -> Tensor:
    """The teacher's state at times `s` `(B,)` from its state `x` at `t`: DDIM (order 1), or with the mean of both ends' predictions (2).

    The second order is Heun's rule along sigma/alpha, in which the path of a constant prediction is straight; where alpha is below 0.01,
    at the very end, that ratio is no coordinate any more and the step stays of first order.
    """
    process = teacher.process
    x0, noise = teacher.parts(x, t, labels)
    near = process.diffuse(x0, noise, s)
    if order == 1:
        return near
    _, other = teacher.parts(near, s, labels)
    # d(x/alpha)/d(sigma/alpha) = noise; alpha may be 0 at the far end, so the step is taken from the near one
    mean = (noise + other) / 2
    a_t, a_s, s_t, s_s = (expand(v, x) for v in (process.alpha(t), process.alpha(s), process.sigma(t), process.sigma(s)))
    second = a_s / a_t.clamp_min(1e-3) * (x - s_t * mean) + s_s * mean
    return torch.where(a_t > 1e-2, second, near)


@torch.no_grad()
def guidance_error(pair: Pair, generator: Generator, steps: int, count: int = 256) -> float:
    """Root mean squared distance between a generator's samples and the guided teacher's, same DDIM steps, same noise."""
    rng = torch.Generator().manual_seed(pair.seed)
    noise = torch.randn(count, *pair.pictures.shape, generator=rng).to(pair.device)
    labels = (torch.arange(count) % pair.classes).to(pair.device)
    assert pair.teacher is not None
    few = Generator(pair.teacher, pair.pictures.shape, sampler="ddim", options={"grid": pair.spec.grid})
    return float((generator.from_noise(noise, labels, steps) - few.from_noise(noise, labels, steps)).square().mean().sqrt())
