"""What methods share that slim a network by scores of its channels: sparse training, a ratio or a budget, inheritance of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.data.batches import Batches
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.knowledge.program import steps_of
from limbeck.losses import attention_transfer
from limbeck.method import setting
from limbeck.signals.modes import evaluating
from limbeck.signals.outputs import call
from limbeck.signals.signals import Signals
from limbeck.structure import pruning
from limbeck.structure.pruning import Groups
from limbeck.structure.pruning.thresholds import Drops
from limbeck.structure.shaper import Making, Pair, Shaper


@dataclass
class Slimming(Shaper):
    """Base: train scales towards zero, remove what scores least, recover with the labels and the attention maps of the teacher.

    loss = hard loss + (beta / 2) sum_j mean (Q_t^j - Q_s^j)^2, Q^j = sum of squared channels of stage j at each place, of length 1.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    student_wants: ClassVar[tuple[str, ...]] = ("logits", "stages")
    teacher_wants: ClassVar[tuple[str, ...]] = ("logits", "stages")
    contract: ClassVar[Mapping[str, Any]] = {
        "ratio": 0.4,
        "recipe": {
            "teacher": {"model": "cnn", "args": {"width": 4, "depth": 2}, "train": {"steps": 20, "lr": 0.01}},
            "student": {"model": "teacher"},
        },
    }

    ratio: float = setting(0.6, "quantile of the scores below which channels go; a budget finds it itself", at_least=0, at_most=1)
    sparse: float = setting(0.5, "steps of the sparse training, as a share of the recovery's; 0 leaves it out", at_least=0)
    rate: float = setting(1e-3, "s0, weight of the sum of |gamma| (recalled range 1e-4 to 1e-2)", at_least=0)
    late: float = setting(0.5, "share of the sparse training after which the rate falls, channel by channel", at_least=0, at_most=1)
    calm: float = setting(0.1, "factor of the rate where it has fallen", at_least=0, at_most=1)
    floor: float = setting(0.1, "share of its channels that every layer keeps, at least one channel", above=0, at_most=1)
    fold: bool = setting(True, "move what removed channels say on average into the biases behind them")
    beta: float = setting(
        10.0, "weight of the attention maps; the paper's 1000 is for larger maps and drowns the labels in short training", at_least=0
    )

    # ---- making the student ----

    def reshape(self, student: nn.Module, making: Making) -> nn.Module:
        """Sparse training, then the cut that the ratio or the budget asks for.

        Raises:
            UserError: nothing that can be removed has a score, or the budget cannot be met.
        """
        student = self.prepared(student, making)
        groups = pruning.find_groups(student, making.example.inputs, self.unit_kinds())
        scores = self.scored(student, groups, making)
        means = pruning.mean_inputs(student, calibration(making)) if self.fold else ({}, {})

        def cut(ratio: float) -> nn.Module:
            return pruning.removed(student, groups, self.choose(student, groups, scores, ratio, making))

        ratio, budget = self.ratio, making.budget
        if budget is not None:
            how = f"{self.card.id} with floor {self.floor:g}"
            ratio = making.decided("ratio", lambda: pruning.smallest_ratio(cut, making.cost, budget, how))
        drops = self.choose(student, groups, scores, ratio, making)
        lost = pruning.fold_means(student, groups, drops, *means)
        making.session.notes.append(told(groups, drops, ratio, lost))
        return pruning.removed(student, groups, drops)

    def prepared(self, student: nn.Module, making: Making) -> nn.Module:
        """The network after sparse training."""
        if not self.sparse:
            return student
        if not pruning.sparse.norm_scales(student):
            raise UserError(
                f"{self.card.id} prunes by the scales of batch norms, and {type(student).__name__} has none",
                "use a network with batch norm, or global-pruning with score: magnitude and sparse: 0",
            )
        batches = Batches(making.data.train, min(making.training.batch, len(making.data.train)))
        total = max(1, round(self.sparse * steps_of(making.training, batches.steps_per_epoch)))
        method = pruning.SparseTraining(rate=self.rate, late=self.late, calm=self.calm)
        return making.fit(method, student, "sparse", total=total)

    def unit_kinds(self) -> tuple[str, ...]:
        """The kinds of units that are removed."""
        return ("channels",)

    def scored(self, student: nn.Module, groups: Groups, making: Making) -> dict[str, Tensor]:
        """`{group: (M, units)}`: the norms' scales; groups without norm have none and stay as they are."""
        found = {group.name: pruning.scales(student, group) for group in groups}
        scores = {name: value for name, value in found.items() if value is not None}
        if not scores:
            raise UserError(
                f"no channels of {type(student).__name__} can be removed by the scales of norms: {groups.told()}",
                "use a network with batch norm, or global-pruning with score: magnitude",
            )
        return scores

    def choose(self, student: nn.Module, groups: Groups, scores: dict[str, Tensor], ratio: float, making: Making) -> Drops:
        """The units to remove at a ratio."""
        raise NotImplementedError

    # ---- recovering ----

    def wants(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The stages only where they count."""
        return (("logits", "stages"), ("logits", "stages")) if self.beta else (("logits",), ("logits",))

    def setup(self, pair: Pair) -> None:
        """Check that both networks have the same stages."""
        if not self.beta:
            return
        shapes = [[tuple(stage.shape) for stage in said.stages] for said in (pair.student_signals, pair.teacher_signals)]
        own, other = ([shape[2:] if len(shape) > 3 else shape[1:2] for shape in side] for side in shapes)
        self.places = [j for j, stage in enumerate(pair.student_signals.stages) if stage.ndim >= 3]
        if own != other or not self.places:
            raise UserError(
                f"{self.card.id} compares attention maps stage by stage; the student's stages are {shapes[0]}, the teacher's {shapes[1]}",
                "distil from the network that was cut (student: teacher), or set beta: 0",
            )

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`hard`, and `attention` unless beta is 0."""
        terms = {"hard": self.hard(batch, student.scores)}
        if self.beta:
            maps = [attention_transfer(student.stages[j], teacher.stages[j]) for j in self.places]
            terms["attention"] = self.beta / 2 * torch.stack(maps).sum()
        return terms


def calibration(making: Making, samples: int = 256) -> list[Any]:
    """Inputs of the first training samples, in one batch."""
    index = torch.arange(min(samples, len(making.data.train)))
    return [making.data.train.batch(index).to(making.device).inputs]


def told(groups: Groups, drops: Drops, ratio: float, lost: list[str]) -> str:
    """A sentence for the user: how much went, and where most."""
    units = {group.name: group.units for group in groups if group.name in drops}
    kept = {name: units[name] - len(drops[name]) for name in units}
    most = min(kept, key=lambda name: kept[name] / units[name])
    text = (
        f"pruned at ratio {ratio:.3g}: {sum(kept.values())} of {sum(units.values())} units stay; "
        f"fewest in {most} ({kept[most]} of {units[most]})"
    )
    return text + (f"; what removed units said is lost in {', '.join(lost[:3])} (neither bias nor batch norm)" if lost else "")


def feature_scales(network: nn.Module, groups: Groups, inputs: Any) -> dict[str, tuple[int, ...]]:
    """Height and width of the feature maps that each group's channels form; `()` where they have none."""
    found: dict[str, tuple[int, ...]] = {}
    hooks = []
    for group in groups:

        def note(module: nn.Module, args: Any, output: Tensor, name: str = group.name) -> None:
            found[name] = tuple(output.shape[2:]) if output.ndim > 3 else ()

        hooks.append(network.get_submodule(group.name).register_forward_hook(note))
    try:
        with torch.no_grad(), evaluating(network):
            call(network, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
