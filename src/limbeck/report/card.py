"""The model card that travels with a distilled student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.errors import UserError
from limbeck.report.tables import plain_markdown, run_markdown


def teacher_text(recipe: Any) -> str:
    """Who a recipe learns from, in a few words: "cnn (width=30, depth=4), trained first"."""
    said = []
    for model in recipe.teacher.models.values():
        args = ", ".join(f"{key}={value}" for key, value in model.args.items())
        said.append(model.model + (f" ({args})" if args else "") + (", trained first" if model.train else ""))
    kinds = {"ema": "a moving average of the student", "history": "what the student itself said before"}
    return " and ".join(said) or kinds.get(recipe.teacher.kind, "")


def _evidence(method: str) -> list[str]:
    from limbeck.evaluation.evidence import find

    found = find(method)
    if found is None:
        return [f"Evidence for `{method}`: none is recorded.", ""]
    interval = f", 95 % interval {found.interval[0]:+.4f} to {found.interval[1]:+.4f}" if found.interval else ""
    figures = f"{found.metric} {found.difference:+.4f} against {found.baseline_name} over {len(found.seeds)} seeds{interval}"
    return [f"Evidence for `{method}` ({found.status}): {figures}. {found.claim_tested}", ""]


def provenance(summary: Mapping[str, Any]) -> str:
    """The last line of every card: seed and versions."""
    made = ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())
    return f"Seed {summary['seed']}. Made with {made}."


def model_card(summary: Mapping[str, Any], teacher: str = "") -> str:
    """Markdown for the README of a saved student: what it was distilled from, by which method, and what was measured.

    Args:
        summary: what summary.json holds.
        teacher: who was learned from, see `teacher_text`.
    """
    from limbeck.method import find

    summary, teacher = plain_markdown(summary), plain_markdown(teacher)
    lines = [f"# {summary.get('name', 'student')}: a distilled student", ""]
    try:
        card = find(summary["method"]).card
        lines += [f"Method: `{card.id}`, {card.paper}.", ""]
    except UserError:  # a method given as an object has no registered card
        lines += [f"Method: `{summary['method']}`.", ""]
    if teacher:
        lines += [f"Teacher: {teacher}.", ""]
    data = summary.get("data", {})
    seen = f"{data.get('train')} training samples, {data.get('labelled')} of them with a label that the student could see"
    lines += [f"Data: {data.get('name')}, {seen}; {data.get('test')} test samples.", ""]
    lines += ["Measured on the test split, after the last step:", "", run_markdown(summary), ""]
    if "agreement" in summary:
        lines += [f"Agreement with the teacher: {summary['agreement']['top1']:.1%} of the predictions.", ""]
    lines += _evidence(summary["method"])
    lines += [provenance(summary), ""]
    return "\n".join(lines)
