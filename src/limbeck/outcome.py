"""What a wing's job hands to the run: artifacts to keep, figures, and what the report shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from limbeck.report.page import Section


class Artifact:
    """Something that knows how to write itself into a folder; networks need not be one, the zoo saves them."""

    def save(self, folder: str | Path, card: str = "", extra: dict[str, Any] | None = None) -> None:
        """Write the artifact; `card` becomes its README.md, `extra` goes into its note.

        Args:
            folder: made if it is not there.
            card: Markdown.
            extra: plain data that JSON can hold.
        """
        raise NotImplementedError

    @property
    def held(self) -> Any:
        """What a caller in Python gets; the artifact itself, unless it only carries something."""
        return self


@dataclass
class Outcome:
    """What came of a job.

    Attributes:
        artifacts: what to keep, by folder name ("student", "dataset"): networks, or objects that derive from `Artifact`.
        summary: `method`, `wing`, `metrics`, `primary`, `cost`, `data` and more for summary.json. In `metrics` the role "student" is
            what came out, "baseline" what it is compared with, "teacher" what went in. A wing whose table is not the usual one gives
            `table` (`head`, `rows` of `key`, `name`, `cells`) and `headline`.
        logits: `(N, C)` on the test split by role.
        labels, inputs: of the test split; `inputs` is None when they are no pictures.
        classes: names of the classes.
        sections: makes the wing's own parts of the report from the summary and the log; None for the parts of a classifier.
        more: makes parts that come before those, likewise.
        card: makes the README of the artifacts from the summary; None for a model card.
    """

    artifacts: dict[str, Any]
    summary: dict[str, Any]
    logits: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    inputs: Tensor | None = None
    classes: tuple[str, ...] = ()
    sections: Callable[[Mapping[str, Any], list[dict[str, Any]]], list[Section]] | None = None
    more: Callable[[Mapping[str, Any], list[dict[str, Any]]], list[Section]] | None = None
    card: Callable[[Mapping[str, Any]], str] | None = None
