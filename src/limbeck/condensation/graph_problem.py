"""The problem and the protocol when the samples are graphs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import method as registry
from limbeck import schema, zoo
from limbeck.condensation.graphset import GraphSet, Member
from limbeck.condensation.scoring import BaseProtocol, Score
from limbeck.condensation.students import Lesson, run_quietly
from limbeck.data import Data
from limbeck.data.batches import own_randomness
from limbeck.data.choose import generator
from limbeck.data.graphs import GraphSplit
from limbeck.engine.clock import Clock
from limbeck.engine.program import PlainProgram
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.zoo.graph import CONVOLUTIONS

CHUNK = 256


class GraphProblem:
    """Real graphs by class, and the bytes that a condensed set may take.

    Args:
        data: its training part is a `GraphSplit`.
        condense: `per_class` buys the bytes of so many average real graphs for each class.
        session, seed: of the run.

    Attributes:
        budget: bytes for each class.
        per_class: how many graphs a selection offers to `subset`: more than the budget pays for, since some are too large for what is left.

    Raises:
        UserError: an augmentation, robust scores, further budgets or a baseline that cannot read graphs is asked for, or a class has too
            few graphs.
    """

    graphs = True
    images = False

    def __init__(self, data: Data, condense: schema.Condense, session: Session, seed: int = 0) -> None:
        if condense.siamese or condense.augment:
            raise UserError("graphs are not augmented", 'set condense.siamese="" and leave condense.augment out')
        for name in ("scores", "budgets"):
            if getattr(condense, name):
                raise UserError(f"condense.{name} is not for graphs", "leave it out; compare runs with other values of condense.per_class")
        for baseline in condense.baselines:
            if "graphs" not in getattr(registry.find(baseline.id), "works_on", ()):
                raise UserError(f"the baseline {baseline.id} cannot read graphs", "choose random-real, herding or k-center")
        assert isinstance(data.train, GraphSplit)
        self.data, self.condense, self.session, self.seed = data, condense, session, seed
        self.device, self.classes = session.device, len(data.classes)
        self.input_shape, self.train = tuple(data.input_shape), data.train
        labels = self.train.labels
        assert labels is not None
        self.positions = [(labels == c).nonzero()[:, 0] for c in range(self.classes)]
        self.labelled = torch.cat(self.positions).sort().values
        for name, positions in zip(data.classes, self.positions):
            if len(positions) < condense.per_class:
                raise UserError(
                    f"the class {name!r} has {len(positions)} training graphs, fewer than the {condense.per_class} asked for",
                    f"set condense.per_class to at most {len(positions)}",
                )
        self.sizes = [graph.bytes() for graph in self.train.graphs]
        self.budget = condense.per_class * sum(self.sizes) / len(self.sizes)
        self.per_class = min(10 * condense.per_class + 50, *map(len, self.positions))

    def whole_bytes(self) -> dict[str, int]:
        """Bytes of the real training graphs."""
        return {"images": sum(self.sizes)}

    def protocol(self, recipe: schema.Recipe) -> GraphProtocol:
        """How sets of graphs are judged."""
        return GraphProtocol(self, recipe)

    def features(self, index: Tensor, what: str = "inputs") -> Tensor:
        """`(n, T + 8)`: counts of node types and of degrees (0 to 7 and more) of training graphs.

        Raises:
            UserError: a teacher's features are asked for.
        """
        if what != "inputs":
            raise UserError("graphs have no teacher's features", "set method.features=inputs")
        rows = []
        for i in index.tolist():
            graph = self.train.graphs[i]
            degrees = torch.bincount(graph.edges[1], minlength=len(graph.types)).clamp(max=7)
            kinds = torch.bincount(graph.types, minlength=self.input_shape[0])
            rows.append(torch.cat([kinds, torch.bincount(degrees, minlength=8)]).float())
        return torch.stack(rows)

    def subset(self, index: Tensor) -> GraphSet:
        """Real training graphs as a set, class after class; of each class as many, in the order given, as the budget pays for."""
        labels = self.train.labels
        assert labels is not None
        members = []
        for c in range(self.classes):
            spent = 0.0
            for i in [i for i in index.tolist() if int(labels[i]) == c]:
                if spent + self.sizes[i] <= self.budget:
                    spent += self.sizes[i]
                    members.append(Member(self.train.graphs[i], c))
        return GraphSet(members, self.data.classes, self.input_shape[0])

    def initial(self, kind: str) -> GraphSet:
        """Random real graphs that fit into the budget ("real").

        Raises:
            UserError: another kind.
        """
        if kind != "real":
            raise UserError(f"a set of graphs cannot start from {kind!r}", "choose real")
        own = generator(self.seed, 11)
        return self.subset(torch.cat([p[torch.randperm(len(p), generator=own)] for p in self.positions]))


class GraphStudentProgram(PlainProgram):
    """One graph network that learns from a set, as an engine program; an epoch draws as many graphs as the set has.

    Args:
        network: in the state in which it begins.
        set: what it learns from.
        training: `epochs`, `batch` and the optimiser.
    """

    def __init__(self, network: nn.Module, set: GraphSet, training: Any) -> None:
        self.network, self.set, self.training = network, set, training
        self.batch = min(training.batch, len(set))
        self.steps_per_epoch = max(1, len(set) // self.batch)
        self.total = training.steps or math.ceil(training.epochs * self.steps_per_epoch)

    def modules(self) -> dict[str, nn.Module]:
        return {"student": self.network}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        from limbeck.engine.schedule import make_optimizer

        return {"student": make_optimizer(self.training, self.network.parameters())}

    def batches(self, epoch: int, start: int) -> Iterator[Lesson]:
        order = self.set.draw(len(self.set))
        for step in range(start, self.steps_per_epoch):
            index = order[step * self.batch : (step + 1) * self.batch]
            inputs, y = self.set.batch(index)
            yield Lesson(inputs, y, index)  # type: ignore[arg-type]

    def turns(self, clock: Clock) -> Sequence[str]:
        return ("student",)

    def losses(self, turn: str, batch: Lesson, clock: Clock) -> dict[str, Tensor]:
        return {"hard": F.cross_entropy(self.network(**batch.x), batch.y)}  # type: ignore[arg-type]


class GraphProtocol(BaseProtocol):
    """Scores sets of graphs by fresh graph networks: accuracy and area under the ROC curve on the measured split."""

    def __init__(self, problem: GraphProblem, recipe: schema.Recipe) -> None:
        super().__init__(problem, recipe)
        if len(self.rates) > 1:
            raise UserError("graph networks are trained with one learning rate", "give condense.students.lr and leave condense.lrs out")

    def make(self, spec: schema.Model, outputs: int | None) -> nn.Module:
        if spec.model.removeprefix("zoo:") not in CONVOLUTIONS:
            raise UserError(f"the network {spec.model!r} does not read graphs", "choose gin, gcn or sage, or run on pictures or tables")
        return zoo.build(spec.model, **{"input_shape": self.problem.input_shape, "classes": self.problem.classes, **spec.args})

    def score(self, set: GraphSet, architecture: str | None = None, augment: Sequence[str] | None = None) -> Score:
        """Train `condense.seeds` fresh networks on a set and measure them."""
        architecture = architecture or self.inner
        training = self.condense.students
        return self._kept([set.fingerprint(), architecture], training, self.rates, lambda: self._measure(set, architecture, training))

    def whole(self, architecture: str | None = None) -> Score:
        """The same for all real training graphs, with `condense.whole_training` in place of the students' length."""
        architecture = architecture or self.inner
        training, problem = self.whole_training, self.problem
        labels = problem.train.labels.tolist()
        members = [Member(graph, label) for graph, label in zip(problem.train.graphs, labels) if label >= 0]
        made = GraphSet(members, problem.data.classes, problem.input_shape[0])
        return self._kept(["whole", architecture], training, self.rates, lambda: self._measure(made, architecture, training))

    def _measure(self, set: GraphSet, architecture: str, training: Any) -> Score:
        accuracies, areas = [], []
        for number, network in enumerate(self.students(architecture, self.condense.seeds)):
            with own_randomness(self.problem.seed, 78, number):
                run_quietly(GraphStudentProgram(network, set, training))
            accuracy, area = self._accuracy(network.eval())
            accuracies.append(accuracy)
            areas.append(area)
        return Score(accuracies, self.rates[0], {"auc": sum(areas) / len(areas)})

    @torch.no_grad()
    def _accuracy(self, network: nn.Module) -> tuple[float, float]:
        from sklearn.metrics import roc_auc_score

        split = self.split
        logits = torch.cat([network(**split.batch(index).inputs) for index in torch.arange(len(split)).split(CHUNK)])
        labels = split.labels
        shares = logits.softmax(1).numpy()
        area = roc_auc_score(labels.numpy(), shares[:, 1] if shares.shape[1] == 2 else shares, multi_class="ovr")
        return float((logits.argmax(1) == labels).double().mean()), float(area)
