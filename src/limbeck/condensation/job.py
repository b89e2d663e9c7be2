"""A whole job of the condensation wing: the set, what it is compared with, and what each of them is worth."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limbeck import method as registry
from limbeck import models, schema
from limbeck.condensation import report
from limbeck.condensation.condenser import Condenser
from limbeck.condensation.graph_problem import GraphProblem
from limbeck.condensation.problem import Problem
from limbeck.condensation.program import CondensationProgram
from limbeck.condensation.scoring import BaseProtocol, Score
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.condensation.teachers import teacher_networks
from limbeck.data import Data
from limbeck.data.graphs import GraphSplit
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import UserError
from limbeck.outcome import Outcome

PHASE = "set"
"""The phase of the log in which the set is optimised."""


def make_method(spec: schema.Method, given: Any = None) -> Condenser:
    """A method of this wing, made from a recipe's block.

    Raises:
        UserError: it belongs to another wing.
    """
    return registry.of_wing(spec.id, spec.settings, given, Condenser, "condensation")


def check_recipe(recipe: schema.Recipe) -> schema.Condense:
    """The recipe's `condense` block; refuses what this wing would ignore.

    Raises:
        UserError: the `training` block sets more than the number of outer steps and clipping, or there are stages.
    """
    usual = schema.Training(epochs=recipe.training.epochs, steps=recipe.training.steps, clip=recipe.training.clip)
    other = [k for k, v in recipe.training.model_dump().items() if v != getattr(usual, k)]
    if other:
        raise UserError(
            f"training.{other[0]} has no meaning for a condensation: a method has an optimiser of its own",
            f"`limbeck show {recipe.method.id}` lists its settings; students are set by condense.students",
        )
    if recipe.stages:
        raise UserError("a condensation has no stages", "leave `stages` out")
    if recipe.precision != "no":
        raise UserError(f"precision {recipe.precision} is not for condensation", "leave precision=no: gradients of gradients need float32")
    condense = recipe.condense or schema.Condense()
    if condense.scores and not condense.whole:
        raise UserError("condense.scores needs the accuracy of the whole set", "set condense.whole=true")
    for baseline in condense.baselines:
        if make_method(baseline).card.family != "baseline":
            raise UserError(
                f"{baseline.id} is no selection of real samples", "compare methods with `limbeck compare`; baselines are quick ones"
            )
    return condense


def open_problem(recipe: schema.Recipe, data: Data, session: Session, given: Mapping[str, Any]) -> Problem | GraphProblem:
    """The problem that a recipe poses: its data, inner network and teachers; a `GraphProblem` where the samples are graphs."""
    condense = check_recipe(recipe)
    if isinstance(data.train, GraphSplit):
        if recipe.teacher.models or "teacher" in given or "student" in given:
            raise UserError("condensing graphs takes no teacher and no network objects", "leave them out; name gin, gcn or sage as student")
        return GraphProblem(data, condense, session, recipe.seed)
    teachers = teacher_networks(recipe, data, session, given)
    return Problem(data, condense, given.get("student", recipe.student), session, recipe.seed, teachers)


def _check(method: Condenser, problem: Problem | GraphProblem, recipe: schema.Recipe) -> None:
    kind = "graphs" if problem.graphs else "samples"
    if kind not in method.works_on:
        raise UserError(
            f"{method.card.id} condenses {' or '.join(method.works_on)}, and {problem.data.name} holds {kind}",
            "`limbeck methods --wing condensation` lists the others" if kind == "samples" else "use mirage, or data of pictures or tables",
        )
    if isinstance(problem, GraphProblem):
        return
    if method.needs_teachers and not problem.teachers:
        raise UserError(
            f"{method.card.id} needs trained networks, and the recipe names none", "set `teacher`, with a `train` block for each network"
        )
    if method.needs_norm == "no-batch" and (bad := problem.batch_norms):
        raise UserError(
            f"{method.card.id} cannot use {recipe.student.model}: its layer {bad[0]} normalises over the batch, so that a handful of "
            "synthetic images of one class would see other statistics than real ones",
            "use a network with instance norm, for example student: {model: convnet, args: {norm: instance}}",
        )


def condense(method: Condenser, problem: Problem | GraphProblem, steps: int | None, clip: float | None = None) -> SyntheticSet:
    """Prepare a method, run its outer steps through the engine, and finish its set; goes on where it stopped.

    Args:
        method: it is changed; give a copy.
        problem: the real data.
        steps: outer steps; None for the method's `iterations`.
        clip: the greatest gradient norm.
    """
    seed_everything(problem.seed, f"{method.card.id} preparation")
    method.prepare(problem)
    seed_everything(problem.seed, f"{method.card.id} beginning")
    made = method.begin(problem)
    if method.optimizers(made):
        total = method.iterations if steps is None else steps
        if total < 1:
            raise UserError(f"{method.card.id} has no outer steps to make", "set training.steps or method.iterations to at least 1")
        program = CondensationProgram(method, made, problem, total, clip)
        problem.session.fit(program, PHASE, seed=problem.seed, evaluate=False)
        made = program.set
    seed_everything(problem.seed, f"{method.card.id} finish")
    return method.finish(made, problem)


@dataclass
class Entry:
    """One set in the table: what it is called, and its scores by architecture."""

    key: str
    name: str
    scores: dict[str, Score]
    samples: int
    bytes: dict[str, int]

    @property
    def size(self) -> int:
        """All stored bytes."""
        return sum(self.bytes.values())

    def figures(self, inner: str) -> dict[str, float]:
        """Plain figures for the summary: those of the inner network, then the accuracy of each other architecture."""
        own = self.scores[inner]
        found = {"accuracy": own.mean, "accuracy_std": own.std, "lr": own.lr, "samples": self.samples, "bytes": self.size}
        found |= {name: value for name, value in own.metrics.items() if name != "accuracy"}
        if "auc" in own.metrics:  # of graphs, whose every architecture counts
            found["auc"] = sum(score.metrics["auc"] for score in self.scores.values()) / len(self.scores)
        return found | {f"accuracy of {name}": score.mean for name, score in self.scores.items() if name != inner}


class _Counter:
    """Shows how many sets have been scored."""

    def __init__(self, session: Session, total: int) -> None:
        self.session, self.done = session, 0
        for callback in session.callbacks:
            callback.start("scores", 0, total)

    def tick(self) -> None:
        self.done += 1
        for callback in self.session.callbacks:
            callback.tick(self.done)

    def finish(self) -> None:
        for callback in self.session.callbacks:
            callback.finish("scores")


def run(recipe: schema.Recipe, session: Session, given: Mapping[str, Any]) -> Outcome:
    """Condense as the recipe says, and judge the set beside its baselines by one protocol.

    Args:
        recipe: checked.
        session: device, folder, callbacks.
        given: Python objects that stand in for the recipe's references: "teacher", "student", "data", "method".
    """
    data = models.open_recipe_data(recipe.data, given.get("data"))
    method = copy.deepcopy(make_method(recipe.method, given.get("method")))
    session.digest += data.fingerprint
    problem = open_problem(recipe, data, session, given)
    _check(method, problem, recipe)
    protocol = problem.protocol(recipe)
    made = condense(method, problem, recipe.training.steps, recipe.training.clip).as_stored()
    session.notes += [f"{PHASE}: {text}" for text in method.alarms()]
    entries = _judge(method, made, problem, protocol)
    return _outcome(recipe, method, made, problem, protocol, entries)


def _baseline(spec: schema.Method, method: Condenser, made: SyntheticSet, problem: Problem | GraphProblem) -> tuple[str, SyntheticSet]:
    """A baseline's set, with the same soft labels that the method gives its own."""
    own = make_method(spec)
    own.prepare(problem)
    found = own.finish(own.begin(problem), problem)
    name = own.card.id
    if made.soft or made.targets is not None:
        softened = method.soften(found, problem)
        if softened is None:
            raise UserError(f"{method.card.id} made soft labels and cannot give them to other images", "its `soften` is missing")
        found, name = softened, f"{name}, same labels"
    return name, found.as_stored()


def _judge(method: Condenser, made: SyntheticSet, problem: Problem | GraphProblem, protocol: BaseProtocol) -> list[Entry]:
    """Score the whole set, the baselines and the synthetic set on every architecture; the first entry is the synthetic one."""
    spec = problem.condense
    counter = _Counter(problem.session, len(protocol.architectures) * (1 + spec.whole + len(spec.baselines)))

    def entry(key: str, name: str, set: SyntheticSet) -> Entry:
        scores = {}
        for architecture in protocol.architectures:
            scores[architecture] = protocol.score(set, architecture)
            counter.tick()
        return Entry(key, name, scores, len(set), set.bytes())

    found = [entry("student", method.card.id, made)]
    for number, baseline in enumerate(spec.baselines):
        seed_everything(problem.seed, f"baseline {number}")
        name, set = _baseline(baseline, method, made, problem)
        found.append(entry("baseline" if number == 0 else name, name, set))
    if spec.whole:
        scores = {}
        for architecture in protocol.architectures:
            scores[architecture] = protocol.whole(architecture)
            counter.tick()
        found.append(Entry("teacher", "the whole set", scores, len(problem.labelled), problem.whole_bytes()))
    counter.finish()
    return found


def _outcome(
    recipe: schema.Recipe,
    method: Condenser,
    made: SyntheticSet,
    problem: Problem | GraphProblem,
    protocol: BaseProtocol,
    entries: list[Entry],
) -> Outcome:
    inner = protocol.inner
    metrics = {entry.key: entry.figures(inner) for entry in entries}
    by_key = {entry.key: entry for entry in entries}
    if problem.condense.scores:
        seed_everything(problem.seed, "robust scores")
        metrics["student"] |= protocol.robust_scores(
            method, made, problem.initial("real").as_stored(), by_key["teacher"].scores[inner].mean
        )
    seed_everything(problem.seed, "figures")
    metrics["student"] |= method.figures(made, problem)
    curve = report.budget_curve(problem, protocol) if problem.condense.budgets else {}
    summary: dict[str, Any] = {
        "method": method.card.id,
        "wing": "condensation",
        "metrics": metrics,
        "primary": "accuracy",
        "cost": {entry.key: {"bytes": entry.size, "samples": entry.samples} for entry in entries},
        "storage": {entry.key: entry.bytes for entry in entries},
        "scores": {e.name: {a: {"accuracies": s.accuracies, "lr": s.lr} for a, s in e.scores.items()} for e in entries},
        "budgets": curve,
        "data": problem.data.describe(),
        "main_phase": PHASE,
    }
    if problem.graphs:
        summary["graphs"] = {"node_types": problem.input_shape[0], "members": len(made)}
    summary["table"] = report.table(entries, protocol)
    summary["headline"] = report.headline(entries, protocol)
    sections = lambda summary, log: report.sections(made, entries, summary, log, protocol)  # noqa: E731
    return Outcome({"dataset": made}, summary, classes=problem.data.classes, sections=sections, card=report.card)
