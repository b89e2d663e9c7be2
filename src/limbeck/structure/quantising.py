"""What quantising methods share: which layers, how many bits, the budget, and the last rounding."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from limbeck.data import Batches
from limbeck.data.data import Data
from limbeck.errors import UserError
from limbeck.method import setting
from limbeck.structure.shaper import Making, Models, Shaper
from limbeck.tasks import Task
from limbeck.zoo import quantised
from limbeck.zoo.lora import is_adapted
from limbeck.zoo.quantised import Scheme

DEFAULT_BITS = 4
"""Of a weight, where neither the method nor a budget says how many."""


@dataclass
class Quantiser(Shaper):
    """Base of methods whose student computes with quantised weights: `reshape` quantises, `finish` folds.

    A subclass says in `scheme(bits)` how weights are quantised. Biases, norms and free tables of positions stay in full precision.
    """

    bits: int | None = setting(
        None,
        "bits of a weight, 1 to 8; left out: as many as structure.budget (bytes, bits, memory) allows, and 4 without a budget",
        at_least=1,
        at_most=8,
    )
    ends: str = setting(
        "same", "first layer, last layer and embeddings: same as the others, 8bit, or full precision", choices=quantised.ENDS
    )
    layers: tuple[str, ...] | None = setting(None, "names of the layers to quantise (see `limbeck inspect`); left out: all that can be")

    def scheme(self, bits: int) -> Scheme:
        """How weights of so many bits are quantised."""
        raise NotImplementedError

    def reshape(self, student: nn.Module, making: Making) -> nn.Module:
        """The student, computing with quantised weights; a student that was folded before is unfolded first."""
        if is_adapted(student):
            raise UserError("the student carries adapters of peft, whose matrices would be quantised apart", "merge the adapter first")
        student = quantised.unfold(student)
        scheme = self.scheme(self.bits or making.decided("bits", lambda: self._affordable(student, making)))
        levels = self.levels_of(student, scheme, making)
        notes = quantised.quantise(student, scheme, ends=self.ends, layers=self.layers, levels=levels)
        budget = making.budget
        if levels is not None and budget is not None and not self.bits:  # the number of bits was chosen before the levels were shared out
            price = making.cost(quantised.fold(copy.deepcopy(student)))
            if not budget.met(price):
                raise budget.refuse(price, "levels shared out by gradients, which may take more bits")
        making.session.notes += [note for note in notes if note not in making.session.notes]
        return student

    def levels_of(self, student: nn.Module, scheme: Scheme, making: Making) -> dict[str, int] | None:
        """Other numbers of levels for some layers, by name; none by default."""
        return None

    def finish(self, student: nn.Module, models: Models | None, data: Data | None) -> nn.Module:
        """The student with packed codes in the place of the quantised weights."""
        return quantised.fold(student)

    def figures(self, student: nn.Module, data: Data, task: Task, device: torch.device) -> dict[str, float]:
        """`bits`: mean bits of a quantised weight with its share of the scales; `huffman_bits`: mean Huffman length of its codes."""
        size = quantised.size_of(student)
        return {"bits": size.bits, "huffman_bits": size.huffman_bits}

    def _affordable(self, student: nn.Module, making: Making) -> int:
        """The most bits with which the folded student is within the budget's bytes, bits and memory."""
        budget = making.budget
        limits = {} if budget is None else {name: limit for name, limit in budget.limits.items() if name in ("bytes", "bits", "memory")}
        if budget is None or not limits:
            return DEFAULT_BITS
        least = 2 if self.scheme(8).symmetric else 1
        cost: dict[str, Any] = {}
        for bits in range(8, least - 1, -1):
            trial = copy.deepcopy(student)
            quantised.quantise(trial, self.scheme(bits), ends=self.ends, layers=self.layers)
            cost = making.cost(quantised.fold(trial))
            if type(budget)(limits).met(cost):
                return bits
        raise budget.refuse(cost, f"weights of {least} bits")


def gradient_norms(student: nn.Module, making: Making, batches: int) -> dict[str, float]:
    """The norm of the labels' gradient in each fake-quantised layer's weight, summed over the first `batches` batches.

    Raises:
        UserError: none of these samples has a label.
    """
    split = making.data.train
    order = Batches(split, min(making.training.batch, len(split)), seed=making.seed)
    reader = making.task.reader(student, (("law",) if making.task.family == "language" else ("logits",)))
    student.train()
    student.zero_grad()
    epoch, seen, labelled = 0, 0, False
    while seen < batches:
        for batch in order.epoch(epoch, 0):
            batch = batch.to(making.device)
            labelled |= bool(batch.labelled.any())
            making.task.hard_loss(reader(batch).scores, batch.labels).backward()
            seen += 1
            if seen == batches:
                break
        epoch += 1
    if not labelled:
        raise UserError("the gradient that shares out the levels needs labels, and the first batches have none", "set allocate: false")
    norms = {name: float(quantised.full_weight(layer).grad.norm()) for name, layer, _ in quantised.fakes(student)}
    student.zero_grad()
    return norms
