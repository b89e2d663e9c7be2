"""How good a generator is: pictures drawn by seed, measured in the features of one classifier, beside what they cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.evaluation.generation import memorisation, quality
from limbeck.sampling.features import Features
from limbeck.sampling.generator import Generator
from limbeck.sampling.pictures import Pictures

MOST = 5000
"""Real pictures that are looked at, of each split."""

FLOOR = "real pictures"
"""The row that everything is read against: the training part measured as if it were generated."""


@dataclass
class Measured:
    """What was found out about one generator at one number of steps.

    Attributes:
        key: its role in tables ("teacher", "baseline", "student", or a name of its own).
        name: what people call it.
        steps, calls: sampler steps, and network evaluations a picture.
        figures: by name, see `limbeck.evaluation.generation.quality`; `class_accuracy` is the share of pictures that the classifier takes
            for the class they were asked to be of.
        latency_ms: for one picture, in a batch of 16.
        pictures: a few, `(K, C, H, W)` in [-1, 1], with their classes.
    """

    key: str
    name: str
    steps: int
    calls: int
    figures: dict[str, float]
    latency_ms: float
    pictures: tuple[Tensor, Tensor] | None = field(default=None, repr=False)


class Judge:
    """Measures generators against real pictures that none of them was trained on.

    Args:
        pictures: the data.
        features: the classifier.
        samples: pictures of each measurement.
        seed: of the noise; the same for every generator, so that differences are paired.
        final: "test" or "valid": the real pictures.
    """

    def __init__(self, pictures: Pictures, features: Features, samples: int, seed: int, final: str = "test") -> None:
        data = pictures.data
        held = data.valid if final == "valid" else data.test
        if held is None:
            raise UserError(f"evaluation.final is {final}, and {data.name} has no such split", "set data.valid, or evaluation.final=test")
        self.pictures, self.features, self.samples, self.seed = pictures, features, samples, seed
        self.held, self.held_labels = self._read(held)
        self.train, self.train_labels = self._read(data.train)
        self.classes = pictures.classes
        if samples < self.classes:
            raise UserError(f"generate.samples is {samples}, and there are {self.classes} classes", "ask for at least one picture a class")
        self.notes: list[str] = []
        try:
            memorisation(self.held, self.train, held_out=self.held)
        except UserError as error:  # the data's fault, not a generator's: the other figures stand
            self.known: Tensor | None = None
            self.notes.append(f"memorisation is not measured: {error.message}")
        else:
            self.known = self.train

    def _read(self, split: Any) -> tuple[Tensor, Tensor | None]:
        found, labels = [], []
        for x, y in self.pictures.whole(split, MOST):
            found.append(self.features(x)[0])
            if y is not None:
                labels.append(y.cpu())
        return torch.cat(found), torch.cat(labels) if labels else None

    def floor(self) -> Measured:
        """The training pictures themselves: as near to the held-out ones as a perfect generator of so many samples is."""
        rng = torch.Generator().manual_seed(self.seed)  # as many as are generated: the distance of a finite sample depends on its size
        some = self.train[torch.randperm(len(self.train), generator=rng)[: self.samples]]
        figures = quality(self.held, some, self.held_labels if self.classes else None, seed=self.seed)
        return Measured("floor", FLOOR, 0, 0, figures, float("nan"), None)

    def measure(self, generator: Generator, steps: int, key: str, name: str) -> Measured:
        """Draw, look, count, time."""
        known = generator.denoiser.classes
        count = self.samples - self.samples % known if known else self.samples
        labels = torch.arange(count) % known if known else None
        x = generator.sample(count, steps, self.seed, labels)
        found, said = self.features(x)
        same = known and known == self.classes
        figures = quality(
            self.held, found, self.held_labels if self.classes else None, labels if same else None, train=self.known, seed=self.seed
        )
        if same and labels is not None:
            figures["class_accuracy"] = float((said == labels).float().mean())
        shown = (x[: 10 * max(1, known)], torch.zeros(10, dtype=torch.long) if labels is None else labels[: 10 * known])
        return Measured(key, name, steps, generator.calls(steps), figures, latency(generator, steps), shown)


@torch.no_grad()
def latency(generator: Generator, steps: int, batch: int = 16, rounds: int = 5) -> float:
    """Median milliseconds for one picture, drawn in batches of 16."""
    noise = torch.randn(batch, *generator.shape, generator=torch.Generator().manual_seed(0)).to(generator.device)
    labels = torch.zeros(batch, dtype=torch.long, device=generator.device) if generator.denoiser.classes else None
    times = []
    for number in range(rounds + 1):
        started = time.perf_counter()
        generator.from_noise(noise, labels, steps)
        if noise.device.type == "cuda":
            torch.cuda.synchronize(noise.device)
        if number:  # the first round warms up
            times.append(time.perf_counter() - started)
    return 1000 * sorted(times)[len(times) // 2] / batch
