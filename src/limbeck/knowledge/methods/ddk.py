"""DDK: training samples flow to the domains in which the student lags its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.data.choose import generator
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.losses import vocabulary
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals


def next_shares(shares: Tensor, ratio: Tensor, smooth: float) -> Tensor:
    """r' = a psi / sum(psi) + (1 - a) / N with psi = r exp(ratio): the domain shares of the next interval.

    Args:
        shares: `(N,)` r, the shares before.
        ratio: `(N,)` perplexity of the student over that of the teacher, domain by domain.
        smooth: a; 1 has no floor and collapses on one domain in time.
    """
    logs = shares.clamp_min(1e-300).log() + ratio
    return smooth * logs.softmax(0) + (1 - smooth) / len(shares)


@dataclass
class DDK(Distiller):
    """Every K steps the perplexities of student and teacher are compared on held-out texts of each domain; r follows their ratio.

    loss = CE(s, y) + gamma KL(t || s), mean over scored tokens
    r_0 = softmax(l_s / l_t);  r <- a psi / sum psi + (1 - a) / N,  psi = r exp(l_s / l_t),  l perplexities of N domains
    The first interval takes the samples as they come; afterwards each sample's domain is drawn from r, and its samples come in cycles.
    """

    card = Card(
        id="ddk",
        title="DDK: Distilling Domain Knowledge for Efficient Large Language Models",
        year=2024,
        arxiv="2407.16154",
        wing="knowledge",
        family="language",
        claim="A mixture of domains that follows the student's gaps to its teacher beats fixed mixtures with the same number of tokens.",
        equation="CE(s, y) + gamma KL(t || s); r <- a softmax(log r + l_s / l_t) + (1 - a) / N",
        baseline="token-level-kd",
        certainty="paper-text",
        deviations="The direction of the KL is not stated in the paper; teacher to student here. `sampling` also offers the fixed mixtures "
        "that it is compared with. Ratios above `most` are cut, because early in training they would put all weight on one domain.",
    )
    tasks: ClassVar[tuple[str, ...]] = ("language",)
    student_wants: ClassVar[tuple[str, ...]] = ("law",)
    teacher_wants: ClassVar[tuple[str, ...]] = ("law",)
    needs_valid: ClassVar[bool] = True

    gamma: float = setting(0.2, "weight of the KL", at_least=0)
    temperature: float = setting(1.0, "T of both distributions, without T^2", above=0)
    smooth: float = setting(0.5, "a: weight of the measured gaps against an even mixture", at_least=0, at_most=1)
    interval: int = setting(1000, "K: steps between two measurements", at_least=1)
    samples: int = setting(500, "validation samples of each domain", at_least=1)
    most: float = setting(20.0, "the greatest ratio of perplexities that counts; not in the paper", above=1)
    sampling: str = setting(
        "follow", "the paper's, or one of the mixtures it is compared with", choices=("follow", "uniform", "proportional")
    )

    def setup(self, pair: Pair) -> None:
        """Find the domains.

        Raises:
            UserError: texts without domains, a domain that is missing in the training or validation part, or a stored teacher.
        """
        self._names = tuple(pair.data.text.domains) if pair.data.text is not None else ()
        self._split, self._valid, self._device, self._batch = pair.data.train, pair.data.valid, pair.device, pair.training.batch
        if len(self._names) < 2 or getattr(self._split, "domains", None) is None:
            raise UserError("ddk needs texts of several domains", "use data.source=stdlib-domains, or a column `domain` in your own files")
        self._members = [(self._split.domains == i).nonzero()[:, 0] for i in range(len(self._names))]
        held = [(self._valid.domains == i).nonzero()[:, 0][: self.samples] for i in range(len(self._names))]
        for part, rows in (("training", self._members), ("validation", held)):
            empty = [name for name, own in zip(self._names, rows) if not len(own)]
            if empty:
                raise UserError(f"the {part} part has no text of {', '.join(empty)}", "give it more samples, or leave the domain out")
        self._held = held
        self._orders: dict[int, tuple[int, Tensor]] = {}  # of each domain the permutation in use; arithmetic, so it is no state
        count = len(self._names)
        even = torch.full((count,), 1 / count, dtype=torch.float64)
        self.state = {"shares": even, "taken": torch.zeros(count, dtype=torch.int64), "follows": self.sampling == "uniform"}
        if self.sampling == "follow":
            if not pair.teacher.networks():
                raise UserError(
                    "ddk measures the teacher on validation texts, and stored outputs are those of the training texts",
                    "name the teacher itself, or set sampling to uniform or proportional",
                )
            self._taught = self._perplexities(pair.teacher, pair.student)
            self.state["shares"] = self._ratio(pair.read_student, pair.student).softmax(0)
            self.state["history"] = []

    @torch.no_grad()
    def _perplexities(self, read: Any, module: nn.Module) -> Tensor:
        """`(N,)` of each domain's held-out texts; `module` is put into evaluation mode meanwhile."""
        was_training = module.training
        module.eval()
        found = []
        for rows in self._held:
            total, count = torch.zeros((), dtype=torch.float64), 0
            for part in rows.split(max(self._batch, 16)):
                batch = self._valid.batch(part).to(self._device)
                law = read(batch).law
                total += vocabulary.cross_entropy(law, self.task.targets(batch.labels), reduction="sum").double().cpu()
                count += len(law)
            found.append((total / count).exp())
        module.train(was_training)
        return torch.stack(found)

    def _ratio(self, read: Any, module: nn.Module) -> Tensor:
        """`(N,)` the student's perplexity over the teacher's, domain by domain, at most `most`."""
        return (self._perplexities(read, module) / self._taught).clamp_max(self.most)

    def _drawn(self, size: int) -> Tensor:
        """`(size,)` positions in the training part: domains from the shares, samples of a domain in cycles of permutations."""
        picks = torch.multinomial(self.state["shares"], size, replacement=True)
        taken, index = self.state["taken"], torch.empty(size, dtype=torch.int64)
        for place, domain in enumerate(picks.tolist()):
            rows = self._members[domain]
            round_, number = divmod(int(taken[domain]), len(rows))
            if self._orders.get(domain, (None,))[0] != round_:
                self._orders[domain] = (round_, torch.randperm(len(rows), generator=generator(domain, round_, len(rows))))
            index[place] = rows[self._orders[domain][1][number]]
            taken[domain] += 1
        return index

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """On the batch as it came, or on one that is drawn by domain."""
        self._models = models
        if self.state["follows"]:
            batch.extra["other_items"] = ("ce", "forward")
            batch = self._split.batch(self._drawn(len(batch))).to(self._device).replace(extra=batch.extra)
        return super().step(batch, models, clock)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`ce` and `forward`."""
        distance = vocabulary.divergence(student.law, teacher.law, "forward", temperature=self.temperature)
        return {"ce": self.hard(batch, student.law), "forward": self.gamma * distance}

    def after_step(self, clock: Clock) -> None:
        """At the end of an interval: measure, and move the shares."""
        if self.sampling != "follow" or (clock.step + 1) % self.interval:
            return
        ratio = self._ratio(self._models.student, self._models.module)
        self.state["shares"] = next_shares(self.state["shares"], ratio, self.smooth)
        self.state["follows"] = True
        self.state["history"].append(self.state["shares"].tolist())

    def figures(self, student: nn.Module, data: Any, task: Any, device: torch.device) -> dict[str, float]:
        """`nll@<domain>` on the test split, `domain_nll` their mean, `worst_nll` the greatest, `swing` how much the shares moved.

        `swing` is the standard deviation of each domain's share over the updates, a mean over the domains.
        """
        found = {}
        for number, name in enumerate(self._names):
            rows = (data.test.domains == number).nonzero()[:, 0]
            if len(rows):
                found[f"nll@{name}"] = task.measure(student, data.test.subset(rows), 64, device).metrics["nll"]
        figures = {**found, "domain_nll": sum(found.values()) / max(len(found), 1), "worst_nll": max(found.values(), default=0.0)}
        if len(self.state.get("history", [])) > 1:
            figures["swing"] = float(torch.tensor(self.state["history"]).std(0).mean())
        return figures
