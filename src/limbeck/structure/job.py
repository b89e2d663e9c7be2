"""A whole job of the structure wing: the knowledge wing's stages with methods that make their own student, and what the budget bought."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from limbeck import schema
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.evaluation.budget import Budget
from limbeck.knowledge import job
from limbeck.outcome import Outcome
from limbeck.structure import report


def run(recipe: schema.Recipe, session: Session, given: Mapping[str, Any]) -> Outcome:
    """Make the student as the recipe says, recover it, and measure teacher, every stage and the same stages without a teacher.

    Args:
        recipe: checked.
        session: device, folder, callbacks.
        given: Python objects that stand in for the recipe's references: "teacher", "student", "data", "method".
    """
    if "student" not in recipe.model_fields_set and "student" not in given and recipe.structure is None:
        raise UserError(
            f"{recipe.method.id} makes its student of another network, and the recipe names none",
            "set student=teacher, or add a `structure` block, which means the same",
        )
    outcome = job.run(recipe, session, given)
    summary = outcome.summary
    summary["wing"] = "structure"
    if recipe.structure is not None and recipe.structure.budget:
        costs = summary["cost"]
        budget = Budget.of(recipe.structure.budget, costs.get("teacher", costs["student"]))
        used = budget.excess(costs["student"])
        summary["budget"] = {"limits": dict(budget.limits), "used": used}
        session.notes += [
            f"the student uses {100 * share:.0f} % of its {name} budget" for name, share in used.items() if share > 1 + report.SLACK
        ]
    summary["methods"] = [(stage.method or recipe.method).id for stage in recipe.stages] or [summary["method"]]
    stages = [stage.name or f"stage-{number}" for number, stage in enumerate(recipe.stages, 1)]
    rows = report.rows(summary, stages)
    summary["table"] = report.table(summary, rows)
    summary["headline"] = report.headline(summary, rows)
    summary.setdefault("main_phase", stages[-1] if len(stages) > 1 else "student")
    outcome.more = partial(report.sections, rows)
    return outcome
