"""`limbeck show`."""

from __future__ import annotations

from typing import Annotated

import typer

from limbeck.errors import visible


def show(method: Annotated[str, typer.Argument(help="A method's id (`limbeck methods`).")]) -> None:
    """One method: paper, equation, settings with their defaults, evidence.

    Example: limbeck show pld
    """
    import inspect
    import textwrap

    from limbeck.cli.methods import evidence_text
    from limbeck.evaluation.evidence import brief
    from limbeck.evaluation.evidence import find as find_evidence
    from limbeck.method import find

    cls = find(method)
    card = cls.card
    print(visible(f"{card.id}: {card.title} ({card.year})" + (f", arXiv:{card.arxiv}" if card.arxiv else "")))
    print(
        f"wing {card.wing}, family {card.family}; details known from: {card.certainty}" + (" (reconstructed)" if card.reconstructed else "")
    )
    print()
    print(inspect.cleandoc(cls.__doc__ or ""))
    print()
    print("loss:    " + "\n         ".join(textwrap.wrap(card.equation, 110)))
    print("claim:   " + "\n         ".join(textwrap.wrap(card.claim, 110)))
    if card.baseline:
        print(visible(f"against: {card.baseline}"))
    if card.deviations:
        print("here:    " + "\n         ".join(textwrap.wrap(card.deviations, 110)))
    if cls.settings():
        print("\nsettings (set them with --set method.NAME=VALUE):")
        values = cls().values()
        for name, item in cls.settings().items():
            note = item.metadata.get("help", "")
            if choices := item.metadata.get("choices"):
                note += f" (one of {', '.join(map(str, choices))})"
            print(visible(f"  {name} = {values[name]!r}"))
            print(textwrap.indent("\n".join(textwrap.wrap(note, 104)), "      "))
    found = find_evidence(card.id)
    print("\nevidence: " + evidence_text(None if found is None else brief(found)))
    if found is not None:
        print("          " + "\n          ".join(textwrap.wrap(found.claim_tested, 110)))
        print(visible(f"          made again by: limbeck evidence {card.id}"))
