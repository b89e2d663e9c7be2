"""Network slimming: one threshold for all channels of a network, and fine-tuning (a baseline)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.errors import UserError
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals
from limbeck.structure import pruning
from limbeck.structure.pruning import Groups
from limbeck.structure.pruning.thresholds import Drops
from limbeck.structure.shaper import Making
from limbeck.structure.slimming import Slimming

_FLOOR = 1e-9


@dataclass
class GlobalPruning(Slimming):
    """The same sparse training, one threshold over all scores of the network, then training on the labels.

    Keep unit c of any layer if its score > t = quantile(ratio) of all scores. A layer keeps one unit at least. With `beta` the recovery
    has the attention maps too. Networks without batch norm are pruned by `score: magnitude` or `taylor`, with `sparse: 0`.
    """

    card = Card(
        id="global-pruning",
        title="Learning Efficient Convolutional Networks through Network Slimming",
        year=2017,
        arxiv="1708.06519",
        wing="structure",
        family="pruning",
        claim="VGGNet on CIFAR with 20 times fewer parameters and 5 times fewer operations at no loss of accuracy.",
        equation="keep c if |gamma_c| > t; CE",
        baseline="alone",
        certainty="recalled",
        deviations="Scores by weights (DepGraph) and by first-order Taylor terms, heads and whole layers are not in the paper.",
    )

    floor: float = setting(_FLOOR, "share of its units that every layer keeps, at least one unit", above=0, at_most=1)
    beta: float = setting(0.0, "weight of the teacher's attention maps; 0: labels alone", at_least=0)
    score: str = setting("scale", "what tells how much a unit matters", choices=("scale", "magnitude", "taylor"))
    units: tuple[str, ...] = setting(("channels",), "kinds of units that go: channels, heads")
    layers: int = setting(0, "whole layers that go first: those that change least what runs through them", at_least=0)

    def unit_kinds(self) -> tuple[str, ...]:
        """As set.

        Raises:
            UserError: a kind that is not known.
        """
        if not self.units or any(kind not in ("channels", "heads") for kind in self.units):
            raise UserError(f"global-pruning: units is {list(self.units)}", "give channels, heads, or both")
        return self.units

    def prepared(self, student: nn.Module, making: Making) -> nn.Module:
        """Without the layers that matter least, after sparse training where norms' scales are the score."""
        if self.layers:
            influence = pruning.block_influence(student, making.example.inputs)
            if len(influence) < self.layers:
                raise UserError(
                    f"{len(influence)} layers of {type(student).__name__} can be left out, and layers is {self.layers}",
                    f"candidates: {', '.join(influence) or 'none'}",
                )
            student = pruning.without_layers(student, sorted(influence, key=influence.__getitem__)[: self.layers], making.example.inputs)
        return super().prepared(student, making) if self.score == "scale" else student

    def scored(self, student: nn.Module, groups: Groups, making: Making) -> dict[str, Tensor]:
        """The norms' scales, the lengths of weights, or Taylor terms over one batch."""
        if self.score == "magnitude":
            return {group.name: pruning.magnitude(student, group) for group in groups}
        if self.score == "taylor":
            return pruning.taylor(student, groups, self._losses(student, making))
        return super().scored(student, groups, making)

    def _losses(self, student: nn.Module, making: Making) -> list[Callable[[], Tensor]]:
        read = making.task.reader(student, ("logits",))

        def loss(batch: Batch) -> Tensor:
            said: Signals = read(batch)
            return self.hard(batch, said.scores)

        from limbeck.data.batches import Batches

        batches = Batches(making.data.train, min(making.training.batch, len(making.data.train)), seed=making.seed)
        chosen = [batch for _, batch in zip(range(8), batches.epoch(0))]
        return [partial(loss, batch.to(making.device)) for batch in chosen]

    def choose(self, student: nn.Module, groups: Groups, scores: dict[str, Tensor], ratio: float, making: Making) -> Drops:
        """One threshold for all."""
        return pruning.global_threshold(scores, ratio, pruning.floors(scores, self.floor))
