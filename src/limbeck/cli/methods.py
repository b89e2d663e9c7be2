"""`limbeck methods`."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer


def describe(cls: Any) -> dict[str, Any]:
    """What `limbeck methods --json` says of one method."""
    from limbeck.evaluation.evidence import brief, find

    card = cls.card
    found = find(card.id)
    return {
        "id": card.id,
        "wing": card.wing,
        "family": card.family,
        "paper": card.title,
        "arxiv": card.arxiv,
        "year": card.year,
        "claim": card.claim,
        "baseline": card.baseline,
        "certainty": card.certainty,
        "reconstructed": card.reconstructed,
        "settings": {name: {"default": value} for name, value in cls().values().items()},
        "evidence": None if found is None else brief(found),
    }


def methods(
    query: Annotated[str | None, typer.Argument(help="Words to look for in id, paper, family and claim.")] = None,
    wing: Annotated[str | None, typer.Option(help="Only this wing.")] = None,
    json: Annotated[bool, typer.Option("--json", help="A JSON list for programs.")] = False,
) -> None:
    """List the methods: what there is, from which paper, and whether its claim held when we tried.

    Examples: limbeck methods | limbeck methods ranking | limbeck methods --wing knowledge --json
    """
    from limbeck.errors import unknown
    from limbeck.method import WINGS, everything

    if wing is not None and wing not in WINGS:
        raise unknown("wing", wing, WINGS)
    rows = [describe(cls) for cls in everything() if wing is None or cls.card.wing == wing]
    if query:
        words = query.lower().split()
        rows = [
            row
            for row in rows
            if all(word in " ".join(map(str, (row["id"], row["paper"], row["family"], row["claim"]))).lower() for word in words)
        ]
    if json:
        print(json_module.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for head in ("method", "family", "year", "paper", "evidence"):
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(row["id"], row["family"], str(row["year"]), row["paper"], evidence_text(row["evidence"]))
    Console().print(table)
    print(f"{len(rows)} methods; `limbeck show METHOD` tells more about one")


def evidence_text(evidence: dict[str, Any] | None) -> str:
    """One line about a method's evidence."""
    if evidence is None:
        return "none yet"
    interval = evidence["interval"]
    span = f" [{interval[0]:+.4f}, {interval[1]:+.4f}]" if interval else ""
    against = f"{evidence.get('baseline_name', 'baseline')}, {len(evidence['seeds'])} seeds"
    return f"{evidence['status']}: {evidence['metric']} {evidence['difference']:+.4f}{span} vs {against}"
