"""AutoDistil: super-models of compact sub-spaces learn a teacher's attention relations; the best sub-network for a budget is cut out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.data import Batches
from limbeck.data.batch import Batch
from limbeck.data.choose import generator
from limbeck.data.data import Data
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.evaluation.budget import Budget, figure_of
from limbeck.method import Card, setting
from limbeck.structure.shaper import Making, Models, Pair, Shaper
from limbeck.structure.supernet import (
    Space,
    SuperNet,
    SuperTraining,
    held_out_loss,
    mask_of,
    relation_loss,
    relations_of,
    texts_of,
)
from limbeck.tasks import Task
from limbeck.zoo.slicing import Shape, extract, shape_of, slices


def _shares(first: int, last: int, whole: int) -> tuple[float, ...]:
    return tuple(n / whole for n in range(first, last + 1))


_WIDE, _NARROW = (2.5, 3.0, 3.5, 4.0), (2.0, 2.5, 3.0, 3.5)
PAPER = {
    "base": {"layers": _shares(9, 12, 12), "heads": _shares(9, 12, 12), "hidden": _shares(17, 20, 24), "ratio": _WIDE},
    "small": {"layers": _shares(9, 12, 12), "heads": _shares(7, 10, 12), "hidden": _shares(8, 11, 24), "ratio": _WIDE},
    "tiny": {"layers": _shares(4, 7, 12), "heads": _shares(7, 10, 12), "hidden": _shares(4, 7, 24), "ratio": _NARROW},
}
"""The sub-spaces of the paper as shares of a whole encoder of 12 layers, 12 heads and width 768: 256 sub-networks each."""


_NEAR = 8
"""Of so many sub-networks nearest in size a random choice takes one."""


@dataclass
class AutoDistil(Shaper):
    """One super-model for each sub-space of sizes, begun with slices of the student as it comes (`student: teacher`), then a search.

    L = sum over Q, K, V of mean (R_s - R_t)^2 on the last layers, R = X X^T / sqrt(a), split again into the teacher's number of heads.
    Each step trains the largest, the smallest and random sub-networks of one super-model, gradients added up. Of all sub-networks within
    the budget the one with the least L on held-out texts is cut out, without retraining, and goes on learning alone with L.
    Inputs are texts (B, L); no label is used.
    """

    card = Card(
        id="autodistil",
        title="AutoDistil: Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language Models",
        year=2022,
        arxiv="2201.12507",
        wing="structure",
        family="search",
        claim="Compact sub-spaces with a super-model each, searched without retraining, beat models compressed by hand at less cost.",
        equation="sum_{Q,K,V} MSE(X_s X_s^T / sqrt(a_s), X_t X_t^T / sqrt(a_t)), last layers, relation heads of the teacher",
        baseline="autodistil",
        deviations="A sub-network of width H has heads of H / A_whole channels, each with the leading channels of the whole head. The "
        "additive mask of padded keys is left out of the MSE, where it cancels. The proxy task (fine-tuning all candidates on one task) is "
        "not offered. The held-out texts are the validation split, or the last training texts where there is none.",
    )
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    contract: ClassVar[dict[str, Any]] = {
        "steps": 4,
        "spaces": {"all": {"layers": [0.5, 1], "heads": [0.5, 1], "hidden": [0.5, 1], "ratio": [1, 2]}},
        "recipe": {
            "teacher": {"model": "bert", "args": {"layers": 2, "width": 32, "heads": 2}, "train": {"steps": 5, "batch": 8}},
            "student": {"model": "teacher"},
            "data": {"source": "stdlib-windows", "train": 100, "test": 32, "valid": 32},
            "text": {"tokenizer": "bpe:320", "length": 24},
        },
    }

    spaces: dict[str, dict[str, tuple[float, ...]]] = setting(  # noqa: RUF009
        PAPER, "sub-spaces by name: layers, heads, hidden as shares of the whole encoder's, ratio F / H; the paper's three"
    )
    partition: bool = setting(True, "a super-model for each sub-space; false: one for all of them, the same steps in all")
    steps: int = setting(300, "optimiser steps of all super-models together (the paper: 8 epochs over Wikipedia and books)", at_least=1)
    per_step: int = setting(4, "sub-networks a step: the largest, the smallest and random ones", at_least=1)
    relation: str = setting("mse", "mse of raw relations (as in the code) or kl of their softmax (the paper)", choices=("mse", "kl"))
    relation_heads: int | None = setting(None, "heads that queries, keys and values are split into; left out: the teacher's", at_least=1)
    held_out: int = setting(256, "texts on which sub-networks are ranked", at_least=1)
    choose: str = setting(
        "best",
        "best by held-out loss within the budget; or random: one of the eight others within the budget that are nearest to it in "
        "parameters (what the search is compared with)",
        choices=("best", "random"),
    )

    def reshape(self, student: nn.Module, making: Making) -> nn.Module:
        """Train the super-models, search, and cut the chosen sub-network out."""
        full = shape_of(student)
        self._heads = self.relation_heads or shape_of(making.teacher).heads
        held = self._held_out(making)
        spaces = {name: Space.of(entries, full).shapes(full) for name, entries in self.spaces.items()}
        if not spaces:
            raise UserError("autodistil has no sub-space to search", "give method.spaces, or leave it out for the paper's")
        if not self.partition:
            joined = {shape for shapes in spaces.values() for shape in shapes}
            spaces = {"all": sorted(joined, key=lambda shape: (_size(student, shape), shape))}
        trained: dict[str, SuperNet] = {}
        for name, shapes in spaces.items():
            method = SuperTraining(per_step=self.per_step, heads=self._heads, kind=self.relation, seed=making.seed)
            net = SuperNet(copy.deepcopy(student), shapes).to(making.device)
            made = making.fit(method, net, f"super-{name}", total=max(1, round(self.steps / len(spaces))), taught=True)
            assert isinstance(made, SuperNet)
            trained[name] = made
        found = making.decided("subnetwork", lambda: self._search(trained, making, held))
        making.session.notes.append(
            f"{found['within']} of {found['all']} sub-networks are within the budget; chosen: {found['shape']} of the sub-space "
            f"{found['space']}, held-out relation loss {found['loss']:.4g}"
        )
        return extract(trained[found["space"]].whole, Shape(**found["shape"]))

    def _held_out(self, making: Making) -> list[Batch]:
        split = making.data.valid
        if split is None:
            split = making.data.train
            split = split.subset(torch.arange(max(0, len(split) - self.held_out), len(split)))
        count = min(self.held_out, len(split))
        batches = Batches(split, min(count, 64), shuffle=False).epoch(0, 0)
        kept, seen = [], 0
        for batch in batches:
            kept.append(batch.to(making.device))
            seen += len(batch)
            if seen >= count:
                break
        texts_of(kept[0])
        return kept

    def _search(self, trained: dict[str, SuperNet], making: Making, held: list[Batch]) -> dict[str, Any]:
        """Rank every sub-network within the budget by its held-out loss; plain data."""
        budget = making.budget
        pairs = [(name, shape) for name, net in trained.items() for shape in net.shapes]
        costs = {pair: self._cost(trained[pair[0]], pair[1], making, budget) for pair in pairs}
        within = [pair for pair in pairs if budget is None or budget.met(costs[pair])]
        if not within:
            assert budget is not None
            name = budget.tightest(costs[pairs[0]])[0]
            raise budget.refuse(min(costs.values(), key=lambda cost: figure_of(cost, name)), "the sub-networks of these sub-spaces")
        losses = {}
        for name, shape in within:
            trained[name].choose(shape)
            losses[name, shape] = held_out_loss(trained[name], making.teacher, held, self._heads, self.relation)
        chosen = min(within, key=lambda pair: losses[pair])
        if self.choose == "random" and len(within) > 1:
            others = [pair for pair in within if pair != chosen]
            near = sorted(others, key=lambda pair: abs(costs[pair]["params"] - costs[chosen]["params"]))
            near = near[:_NEAR]
            chosen = near[int(torch.randint(len(near), (1,), generator=generator(making.seed, 0xA1)))]
        return {
            "space": chosen[0],
            "shape": chosen[1].as_dict(),
            "loss": losses[chosen],
            "within": len(within),
            "all": len(pairs),
        }

    @staticmethod
    def _cost(net: SuperNet, shape: Shape, making: Making, budget: Budget | None) -> dict[str, Any]:
        """What a sub-network costs: its sizes by counting, the rest by measuring where the budget limits it."""
        size = _size(net.whole, shape)
        counted = {"params": size, "bytes": 4 * size}
        if budget is not None and set(budget.limits) - {"params", "bytes", "bits"}:
            return making.cost(extract(net.whole, shape).to(making.device))
        return counted

    def setup(self, pair: Pair) -> None:
        """Whose relations are learned from."""
        self._teacher = next(iter(pair.teacher.networks().values()))

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """`relation`, of the sub-network alone."""
        inputs = texts_of(batch)
        with torch.no_grad():
            teacher = relations_of(self._teacher, inputs)
        return {"relation": relation_loss(relations_of(models.module, inputs), teacher, self._heads, mask_of(inputs), self.relation)}

    def figures(self, student: nn.Module, data: Data, task: Task, device: torch.device) -> dict[str, float]:
        """`relation_loss` on the test texts."""
        batches = [batch.to(device) for batch in Batches(data.test, 256, shuffle=False).epoch(0, 0)]
        return {"relation_loss": held_out_loss(student, self._teacher, batches, self._heads, self.relation)}


def _size(network: nn.Module, shape: Shape) -> int:
    """Parameters of a sub-network, heads and pooling layers included."""
    return sum(tensor.numel() for tensor in slices(network, shape_of(network), shape).values())
