"""Runs of redundant transformer blocks, each replaced by one block that learns between the teacher's own features."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.data.batches import Batches
from limbeck.data.data import Data
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.losses import normalized_l1, normalized_mse
from limbeck.method import Card, setting
from limbeck.structure import intervals as runs
from limbeck.structure.feedforward import linear_layers, straightened
from limbeck.structure.shaper import Making, Models, Shaper
from limbeck.tasks import Task


@dataclass
class PPCL(Shaper):
    """Find runs of blocks that a linear map nearly stands for, and train one block in the place of each run.

    Probing: s_i is how like itself the network's last feature stays when a least squares map replaces block i; neighbours i and i + 1
    are joined where |s_{i+1} - s_i| is small. Depth: for a run [a, b] a copy S of block a learns sum over channels of
    (S(h_a)/|S(h_a)| - h_{b+1}/|h_{b+1}|)^2, where h_a and h_{b+1} are the TEACHER's features: pieces are independent, and any of
    them can be plugged in alone (`limbeck.structure.intervals.plugged`; the figures `teacher_error@k` are of the first k runs).
    Width, another stage: feed-forward parts become linear maps, begun by least squares, with the same distance to the first power.
    Features are `(B, L, D)`.
    """

    card = Card(
        id="ppcl",
        title="Pluggable Pruning with Contiguous Layer Distillation for Diffusion Transformers",
        year=2025,
        wing="structure",
        family="pruning",
        claim="Half of the parameters of a diffusion transformer with less than 3 % degradation of key metrics.",
        equation="sum_runs mean_tokens sum_c (S(h_a)/|S(h_a)| - h_{b+1}/|h_{b+1}|)^2",
        baseline="ppcl",
        certainty="recalled",
        deviations=(
            "How probing chooses the runs is recalled: neighbours are joined in order of the smallest step of the similarity. The "
            "networks here have no stream of text, so its modulation is not replaced; the correction behind each segment is left out."
        ),
    )
    tasks: ClassVar[tuple[str, ...]] = ("denoising",)
    contract: ClassVar[dict[str, Any]] = {"remove": 0.5, "calibration": 2}

    phase: str = setting("depth", "what is replaced: runs of blocks, or feed-forward parts by linear maps", choices=("depth", "width"))
    remove: float = setting(0.5, "share of the blocks (of the feed-forward parts) that go, unless a budget says so", above=0, at_most=1)
    choose: str = setting(
        "probe", "how runs are chosen; uniform and random are what probing is compared with", choices=("probe", "uniform", "random")
    )
    longest: int = setting(10, "blocks of a run at most; the longest of the released runs has 10", at_least=2)
    calibration: int = setting(8, "training batches on which blocks are probed and maps are fitted (this package's choice)", at_least=2)
    output: float = setting(0.0, "weight of the distance of the whole outputs; 0.01 stands in the release, commented out", at_least=0)

    def reshape(self, student: nn.Module, making: Making) -> nn.Module:
        if self.phase == "width":
            return self._straighten(student, making)
        self._teacher = making.teacher
        depth = len(runs.blocks_of(student))
        if len(runs.blocks_of(self._teacher)) != depth:
            raise UserError("ppcl makes its student of the teacher's blocks, and the student is another network", "set student: teacher")
        found = making.decided("intervals", lambda: self._intervals(student, making))
        self._runs = [(int(a), int(b)) for a, b in found]
        told = ", ".join(f"{a}-{b}" for a, b in self._runs)
        making.session.notes.append(f"{making.phase}: one block each for the blocks {told} of {depth}")
        return runs.shortened(student, self._runs)

    def _intervals(self, network: nn.Module, making: Making) -> list[runs.Interval]:
        """The runs for a share of the blocks, or the fewest that keep the budget."""
        depth = len(runs.blocks_of(network))
        costs = self._costs(network, making)
        if making.budget is None:
            return runs.merged(costs, max(1, round(self.remove * depth)), self.longest)
        budget, smallest = making.budget, None
        for remove in range(1, depth):
            try:
                found = runs.merged(costs, remove, self.longest)
            except UserError:
                break
            smallest = making.cost(runs.shortened(network, found))
            if budget.met(smallest):
                return found
        raise budget.refuse(smallest or making.cost(network), f"one block for each run of at most {self.longest}")

    def _costs(self, network: nn.Module, making: Making) -> list[float]:
        """What it costs to join each block with the next."""
        depth = len(runs.blocks_of(network))
        if self.choose == "random":
            return torch.rand(depth - 1, generator=torch.Generator().manual_seed(making.seed)).tolist()
        if self.choose == "uniform":
            # pairs first, then what lies between them: (0, 1), (2, 3), ... and only then (1, 2)
            return [place % 2 + place / (2 * depth) for place in range(depth - 1)]
        scores = runs.probe(network, _reads(network, making, self.calibration))
        return scores.diff().abs().tolist()

    def _straighten(self, student: nn.Module, making: Making) -> nn.Module:
        reads = _reads(student, making, self.calibration)
        made, self._maps = straightened(student, reads, self.remove, making.budget, making.cost, making.decided)
        self._source = copy.deepcopy(student).eval().requires_grad_(False)
        told = ', '.join(map(str, self._maps))
        making.session.notes.append(f"{making.phase}: linear maps for the feed-forward parts of the blocks {told}")
        return made

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """One pass of the teacher feeds every piece; the pass ends behind the last one."""
        terms = self._width(batch, models) if self.phase == "width" else self._depth(batch, models)
        if self.output:
            whole = self.task.soft_loss(models.student(batch).scores, models.teacher(batch).scores)
            terms["output"] = self.output * whole
        return terms

    def _depth(self, batch: Batch, models: Models) -> dict[str, Tensor]:
        begin, end = zip(*self._runs)
        flow = runs.pass_through(self._teacher, lambda: models.teacher(batch), begin, end)
        kept = runs.places(len(runs.blocks_of(self._teacher)), self._runs)
        total = torch.zeros((), device=flow.outputs[end[0]].device)
        for a, b in self._runs:
            segment = models.module.blocks[kept.index((a, b))]  # type: ignore[union-attr,index]
            total = total + normalized_mse(segment(*flow.inputs[a]), flow.outputs[b])
        return {"segments": total}

    def _width(self, batch: Batch, models: Models) -> dict[str, Tensor]:
        read = self.task.reader(self._source, self.wants()[0], grad=False)
        found = linear_layers(self._source, lambda: read(batch), self._maps)
        total = sum(
            normalized_l1(models.module.blocks[number].mlp(x), y)  # type: ignore[union-attr,index]
            for number, (x, y) in found.items()
        )
        return {"maps": total}  # type: ignore[dict-item]

    def figures(self, student: nn.Module, data: Data, task: Task, device: torch.device) -> dict[str, float]:
        """`teacher_error@k` with only the first k runs replaced: the sizes between teacher and student, with no further training."""
        if self.phase == "width":
            return {}
        return {
            f"teacher_error@{count}": task.teacher_error(  # type: ignore[attr-defined]
                runs.plugged(self._teacher, student, self._runs, range(count)), self._teacher, data.test, device
            )
            for count in range(1, len(self._runs))
        }


def _reads(network: nn.Module, making: Making, count: int) -> Sequence[Callable[[], Any]]:
    """Passes of a network over so many training batches, each with its own noise."""
    read = making.task.reader(network.eval(), ("logits",), grad=False)
    order = Batches(making.data.train, min(making.training.batch, len(making.data.train)), seed=making.seed)
    found: list[Batch] = []
    epoch = 0
    while len(found) < count:
        found += [batch.to(making.device) for batch, _ in zip(order.epoch(epoch), range(count - len(found)))]
        epoch += 1
    for batch in found:
        read(batch)  # draws its noise once, for all passes over it
    return [lambda batch=batch: read(batch) for batch in found]
