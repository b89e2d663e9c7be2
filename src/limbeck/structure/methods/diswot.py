"""The student's architecture, chosen without training by how alike untrained teacher and student see a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck import models as recipes
from limbeck import schema
from limbeck.data.batch import Batch
from limbeck.data.batches import Batches
from limbeck.data.data import Data
from limbeck.engine.clock import Clock
from limbeck.engine.session import seed_everything
from limbeck.errors import UserError
from limbeck.knowledge.methods.kd import KD
from limbeck.losses import channel_correlation, similarity_preserving
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals
from limbeck.structure import proxies
from limbeck.structure.search import Genes, check_space, search
from limbeck.structure.shaper import Making, Pair, Shaper
from limbeck.tasks import Task

SPACE = {"depth": [1, 2, 3], "width": [4, 8, 16], "kernel": [3, 5], "pool": ["avg", "max"]}
FIXED = {"out": 16, "norm": "batch"}


@dataclass
class DisWOT(Shaper):
    """Search a space of architectures for the one whose random weights see a batch most as the teacher's random weights do; then distil.

    score = -sum_k |M_k^T - M_k^S|^2 / (C K) - |G^T - G^S|^2 / B^2 (see `limbeck.structure.proxies`), averaged over batches.
    loss = r CE + (1 - r) T^2 KL + beta_relation |G^T - G^S|^2 / B^2 + beta_channel * channel correlation of the last feature maps.
    Feature maps `(B, C, H, W)` or tokens `(B, L, D)`; the student is new, it inherits no weights.
    """

    card = Card(
        id="diswot",
        title="DisWOT: Student Architecture Search for Distillation WithOut Training",
        year=2023,
        arxiv="2303.15678",
        wing="structure",
        family="search",
        claim="A better student for a given teacher than by training-free search of other kinds, with at least 180 times less training.",
        equation="score = -d_semantic - d_relation; r CE + (1 - r) T^2 KL + b1 d_relation + b2 d_channel",
        baseline="diswot",
        certainty="verified-in-code",
        deviations=(
            "Evolution is NSGA-II over score and parameters in place of aging evolution; spaces of at most `trials` networks are looked at "
            "whole. The weights of the two feature terms are this package's choice."
        ),
    )
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    student_wants: ClassVar[tuple[str, ...]] = ("logits", "stages[-1]")
    teacher_wants: ClassVar[tuple[str, ...]] = ("logits", "stages[-1]")
    contract: ClassVar[Mapping[str, Any]] = {
        "space": {"depth": [1, 2], "width": [4, 8]},
        "batch": 16,
        "repeats": 1,
        "recipe": {
            "teacher": {"model": "convnet", "args": {"width": 8, "depth": 2, "out": 16}, "train": {"steps": 20, "lr": 0.01}},
        },
    }

    network: str = setting("convnet", "the network whose arguments are searched")
    space: Mapping[str, list[Any]] = setting(SPACE, "argument -> values to choose from; 36 networks by default")
    fixed: Mapping[str, Any] = setting(FIXED, "further arguments; convnet's out gives all candidates the teacher's width")
    proxy: str = setting("diswot", "what candidates are ranked by; the others are for comparison", choices=proxies.PROXIES)
    trials: int = setting(200, "candidates that are proposed at most (the paper's cycles)", at_least=1)
    population: int = setting(20, "of the evolution", at_least=2)
    batch: int = setting(64, "samples of a mini-batch that is scored", at_least=2)
    repeats: int = setting(3, "mini-batches, each with new random weights", at_least=1)
    temperature: float = setting(4.0, "T of the distillation", above=0)
    label_weight: float = setting(0.1, "r, weight of the labels; the teacher's outputs get the rest", at_least=0, at_most=1)
    beta_relation: float = setting(1.0, "weight of the sample relations of the last feature maps (this package's choice)", at_least=0)
    beta_channel: float = setting(1.0, "weight of the channel relations of the last feature maps (this package's choice)", at_least=0)
    correlate: int = setting(0, "architectures to train by plain distillation, to see how well each ranking foretells accuracy", at_least=0)

    def reshape(self, student: nn.Module, making: Making) -> nn.Module:
        """The best architecture within the budget, with fresh weights.

        Raises:
            UserError: see `limbeck.structure.search.search`, or the widths do not fit the score.
        """
        check_space(self.space)
        if self.correlate:
            self._rank(making)
        found = making.decided("architecture", lambda: self._search(making))
        making.session.notes.append(f"{making.phase}: {found['told']}")
        return self._build(found["genes"], making)

    def _build(self, genes: Genes, making: Making) -> nn.Module:
        args = {**self.fixed, **genes}
        return recipes.build(schema.Model(model=self.network, args=args), making.data, making.seed, "student").to(making.device)

    def _batches(self, making: Making) -> list[tuple[Tensor, Tensor]]:
        order = Batches(making.data.only_labelled().train, min(self.batch, len(making.data.train)), seed=making.seed)
        found = [(batch.inputs.to(making.device), batch.labels.to(making.device)) for batch, _ in zip(order.epoch(0), range(self.repeats))]
        return [found[number % len(found)] for number in range(self.repeats)]

    def _looker(self, making: Making, kind: str) -> Any:
        batches = self._batches(making)

        def look(genes: Genes) -> tuple[float, Mapping[str, Any]] | None:
            try:
                network = self._build(genes, making)
            except UserError:
                return None  # such as more halvings than the pictures have pixels
            seed_everything(making.seed, f"score {sorted(genes.items())}")
            value = float(torch.rand(())) if kind == "random" else proxies.score(kind, network, making.teacher, batches, making.cost)
            return value, making.cost(network)

        return look

    def _search(self, making: Making) -> dict[str, Any]:
        total = self.trials
        for callback in making.session.callbacks:
            callback.start(f"{making.phase}-search", 0, total)

        def tick(done: int) -> None:
            for callback in making.session.callbacks:
                callback.tick(done)

        found = search(
            self.space,
            self._looker(making, self.proxy),
            making.budget,
            trials=self.trials,
            population=self.population,
            seed=making.seed,
            tick=tick,
        )
        for callback in making.session.callbacks:
            callback.finish(f"{making.phase}-search")
        genes = ", ".join(f"{name} {value}" for name, value in found.best.genes.items())
        rest = "; ".join(f"{one.score:.4g} at {one.cost['params']} parameters" for one in found.front)
        told = f"of {found.seen} networks the best by {self.proxy} has {genes} (score {found.best.score:.4g}); front: {rest}"
        return {"genes": found.best.genes, "told": told}

    # ---- the loss ----

    def setup(self, pair: Pair) -> None:
        own, other = pair.student_signals.stages[-1], pair.teacher_signals.stages[-1]
        if self.beta_channel and min(own.ndim, other.ndim) < 3:
            raise UserError("channel relations need feature maps, and here are flat features", "set beta_channel to 0")
        c_own, c_other = _channels(own).shape[1], _channels(other).shape[1]
        if self.beta_channel and c_own != c_other:
            self.parts["bridge"] = nn.Conv1d(c_own, c_other, 1)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`kl`, `ce`, `relation` and `channel`, as far as they have a weight."""
        terms = {"kl": (1 - self.label_weight) * self.task.soft_loss(student.logits, teacher.logits, self.temperature)}
        if self.label_weight:
            terms["ce"] = self.label_weight * self.hard(batch, student.logits)
        own, other = student.stages[-1], teacher.stages[-1]
        if self.beta_relation:
            terms["relation"] = self.beta_relation * similarity_preserving(own, other)
        if self.beta_channel:
            maps = _channels(own)
            maps = self.parts["bridge"](maps) if "bridge" in self.parts else maps
            terms["channel"] = self.beta_channel * channel_correlation(maps, _channels(other))
        return terms

    # ---- how well rankings foretell accuracy ----

    def _rank(self, making: Making) -> None:
        """Train `correlate` architectures of the space, drawn at random, and correlate every ranking with their validation accuracy."""
        from scipy.stats import spearmanr

        if making.data.valid is None:
            raise UserError("correlate measures on a validation split, and there is none", "set data.valid, for example data.valid=0.2")
        rng = torch.Generator().manual_seed(making.seed)
        picked: list[Genes] = []
        for _ in range(50 * self.correlate):
            genes = {name: values[int(torch.randint(len(values), (1,), generator=rng))] for name, values in self.space.items()}
            if genes not in picked and self._looker(making, "params")(genes) is not None:
                picked.append(genes)
            if len(picked) == self.correlate:
                break
        reached = []
        for number, genes in enumerate(picked):
            network = making.fit(KD(temperature=self.temperature), self._build(genes, making), f"rank-{number}", taught=True)
            reached.append(making.task.measure(network, making.data.valid, 512, making.device).metrics[making.task.primary])
        self._rho = {}
        for kind in proxies.PROXIES[:-1]:
            scores = [self._looker(making, kind)(genes)[0] for genes in picked]
            self._rho[kind] = float(spearmanr(scores, reached).statistic)
        told = ", ".join(f"{kind} {rho:+.2f}" for kind, rho in self._rho.items())
        making.session.notes.append(f"Spearman's rank correlation with the accuracy of {len(picked)} trained networks: {told}")

    def figures(self, student: nn.Module, data: Data, task: Task, device: torch.device) -> dict[str, float]:
        """`rho_<proxy>`: rank correlation of each ranking with trained accuracy, where `correlate` asked for it."""
        return {f"rho_{kind}": rho for kind, rho in getattr(self, "_rho", {}).items() if rho == rho}


def _channels(features: Tensor) -> Tensor:
    """`(B, C, positions)`."""
    return features.flatten(2) if features.ndim != 3 else features.transpose(1, 2)
