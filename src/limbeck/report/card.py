"""The model card that travels with a distilled student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.report.tables import run_markdown


def model_card(summary: Mapping[str, Any]) -> str:
    """Markdown for the README of a saved student: what it was distilled from, by which method, and what was measured.

    Args:
        summary: what summary.json holds.
    """
    from limbeck.method import find

    lines = [f"# {summary.get('name', 'student')}: a distilled student", ""]
    try:
        card = find(summary["method"]).card
        lines += [f"Method: `{card.id}`, {card.paper}.", ""]
    except Exception:  # a method given as an object has no registered card
        lines += [f"Method: `{summary['method']}`.", ""]
    data = summary.get("data", {})
    lines += [f"Data: {data.get('name')}, {data.get('train')} training samples, {data.get('labelled')} of them with a label the student could see; {data.get('test')} test samples.", ""]
    lines += ["Measured on the test split, after the last step:", "", run_markdown(summary), ""]
    if "agreement" in summary:
        lines += [f"Agreement with the teacher: {summary['agreement']['top1']:.1%} of the predictions.", ""]
    made = ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())
    lines += [f"Seed {summary['seed']}. Made with {made}.", ""]
    return "\n".join(lines)
