"""What methods share that match the score of their own samples to the teacher's: generator, fake score, critic, two time-scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.diffusion import Denoiser, expand
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.errors import UserError
from limbeck.losses import critic_loss, fooling_loss
from limbeck.method import setting
from limbeck.sampling.critics import Heads, middle_of, widths_of
from limbeck.sampling.few_step import FewStep, Pair, frozen


@dataclass
class ScoreMatching(FewStep):
    """Base of the methods with an online fake score. A subclass says `direction` or `generator_losses`.

    The generator is the student read as a predictor of clean data at one or a few fixed times; a fake network, which starts as the teacher,
    learns to denoise what the generator makes now. With `gan` above 0 a head on the fake network's bottleneck tells noised real pictures
    from noised generated ones (a diffusion GAN, Wang et al. 2022, arXiv:2206.02262).
    """

    data_free = True
    sampler = "renoise"

    ratio: int = setting(1, "updates of the fake score for each one of the generator", at_least=1)
    lr_fake: float = setting(3e-4, "learning rate of the fake score (measured on 8x8 digits; papers: that of the generator)", above=0)
    start: float = setting(1.0, "position in [0, 1] at which the generator begins", above=0, at_most=1)
    low: float = setting(0.02, "lowest position at which the generator is compared (DMD2: 0.02)", at_least=0, at_most=1)
    high: float = setting(0.98, "highest position at which the generator is compared (DMD2: 0.98)", at_least=0, at_most=1)
    gan: float = setting(0.0, "weight of the adversarial term of the generator; 0 for none, and then no picture is looked at", at_least=0)
    critic: float = setting(0.01, "weight of the critic's loss beside the fake score's (DMD2: 0.01)", above=0)

    def needs_pictures(self) -> bool:
        return self.gan > 0

    def setup(self, pair: Pair) -> None:
        if self.low >= self.high:
            raise UserError(f"{self.card.id}: levels from {self.low} to {self.high}", "low must be below high")
        self.times = self._times(pair)
        end = float(pair.student.process.alpha(self.times[:1]))
        if end < 1e-3 and pair.student.prediction in ("noise", "score"):
            raise UserError(
                f"{self.card.id}: the student predicts noise, and where it begins there is nothing else (alpha is {end:.2g})",
                "set method.start below 1, for example 0.95, or give a network that predicts v, velocity or x0",
            )
        self.fake = self.make_fake(pair)
        self.parts["fake"] = self.fake.network
        if self.gan > 0:
            if pair.classes and not pair.pictures.classes:
                raise UserError(f"{self.card.id}: the critic is told classes, and the pictures have none", "set method.gan=0")
            self._paths = middle_of(self.fake)
            self.parts["heads"] = Heads(widths_of(self.fake, pair, self._paths), pair.classes).to(pair.device)
        self._now: tuple[int, Tensor, Tensor | None] | None = None

    def make_fake(self, pair: Pair) -> Denoiser:
        """The network that learns what the generator makes."""
        return pair.copy_of_teacher()

    def _times(self, pair: Pair) -> Tensor:
        process = pair.student.process
        first = float(process.at(torch.tensor(self.start, dtype=torch.float64)))
        return process.times(max(pair.spec.steps), "uniform", first, pair.device)[:-1]

    def sampling(self) -> dict[str, Any]:
        return {} if self.start == 1.0 else {"start": self.start}

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        return {
            "student": make_optimizer(pair.training, [p for p in pair.student.network.parameters() if p.requires_grad]),
            "fake": make_optimizer(pair.training, [p for p in self.parts.parameters() if p.requires_grad], lr=self.lr_fake),
        }

    def turns(self, clock: Clock) -> Sequence[str]:
        return ("student", "fake") if clock.step % self.ratio == 0 else ("fake",)

    # ---- the generator ----

    def inputs(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """State, time `(B,)` and labels at which the generator is trained: made by running it from noise for a random number of its steps
        without gradient, as it will be run later (backward simulation, Yin et al. 2024, arXiv:2405.14867)."""
        pair, student = self.pair, self.pair.student
        labels, process = pair.labels(count), student.process
        many = len(self.times)
        walked = int(torch.randint(many, (1,))) if many > 1 else 0
        t = self.times[0].expand(count)
        noise = pair.noise(count)
        # as sampling begins: at the noise end with noise alone, though alpha may not be 0 there; inside the process without a mean part
        x = expand(process.scale(t) if self.start == 1.0 else process.sigma(t), noise) * noise
        with torch.no_grad():
            for number in range(walked):
                made = student.x0(x, t, labels)
                t = self.times[number + 1].expand(count)
                x = process.diffuse(made, pair.noise(count), t)
        return x, t, labels

    def levels(self, count: int, low: float | None = None, high: float | None = None) -> Tensor:
        """`(B,)` times of the fake score's process (the teacher's) at which scores are compared, uniform in position."""
        low, high = self.low if low is None else low, self.high if high is None else high
        return self.fake.process.draw(count, "uniform", low, high, self.pair.device)

    def told(self, labels: Tensor | None) -> Tensor | None:
        """What the fake network is told of labels."""
        return labels

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        if turn == "student":
            state, t, labels = self.inputs(self.batch_size)
            x = self.show(self.pair.student.x0(state, t, labels), labels)
            self._now = (clock.step, x.detach(), labels)
            terms = self.generator_losses(x, t, labels)
            if self.gan > 0:
                with frozen(self.fake.network, self.parts["heads"]):
                    terms["adversarial"] = self.gan * fooling_loss(self._logits(x, labels)[0])
            return terms
        if self._now is None or self._now[0] != clock.step:
            with torch.no_grad():
                state, t, labels = self.inputs(self.batch_size)
                self._now = (clock.step, self.pair.student.x0(state, t, labels), labels)
        return self.fake_losses(self._now[1], self._now[2], batch)

    def generator_losses(self, x: Tensor, t: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """The generator's terms for its samples `x`, made at its own time `t` `(B,)`."""
        raise NotImplementedError

    # ---- fake score and critic ----

    def _logits(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Noise a batch to random levels and read it: logits, the fake network's raw output, state, noise, time."""
        process = self.fake.process
        t = self.levels(len(x), 0.0, 1.0)
        noise = torch.randn_like(x)
        state = process.diffuse(x, noise, t)
        features, raw = self.fake.features(state, t, self.told(labels), self._paths)
        return self.parts["heads"](features, labels), raw, state, noise, t

    def fake_losses(self, x: Tensor, labels: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        """Denoise what the generator made, over the whole range of levels; with a critic its loss, from the very same pass."""
        if self.gan == 0:
            t = self.levels(len(x), 0.0, 1.0)
            return {"fake": self.fake.denoising_loss(x, torch.randn_like(x), t, self.told(labels))}
        said, raw, state, noise, t = self._logits(x, labels)
        _, own = self.fake.own_state(state, t)
        target = self.fake.own.read(self.fake.prediction, x, noise, own, self.fake.sigma_data)
        return {"fake": (raw - target).square().mean(), "critic": self.critic_term(said, batch)}

    def critic_term(self, said: Tensor, batch: Batch) -> Tensor:
        """The critic's weighted loss from its logits on generated samples and a batch of real ones."""
        real, *_ = self._logits(batch.inputs, batch.labels if self.pair.classes else None)
        return self.critic * critic_loss(real, said)
