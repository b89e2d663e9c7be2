"""Embedding: texts that belong together get vectors that lie together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.errors import UserError
from limbeck.losses import info_nce
from limbeck.signals.modes import evaluating
from limbeck.signals.outputs import call
from limbeck.signals.signals import Signals
from limbeck.tasks.base import Measured, Task

if TYPE_CHECKING:
    from limbeck.data.split import Split
    from limbeck.data.text import Text

SIDES = ("query", "document")


class EmbeddingReader:
    """Calls an encoder with both sides of a batch of pairs.

    Signals: `query` and `document`, `(B, D)` embeddings of length 1; of an encoder with several exits these are the last one's, and
    `at["query"]`, `at["document"]` list all of them, shallow to deep.

    Args:
        model: `model(input_ids=..., attention_mask=...)` gives `(B, D)`, or a list of such tensors.
        grad: keep the graph.
        wants, stop_early, anatomy: taken for the sake of one interface; there is nothing to choose.
    """

    def __init__(
        self, model: nn.Module, wants: Sequence[str] = (), *, grad: bool = True, stop_early: bool = False, anatomy: Any = None
    ) -> None:
        self.model, self.grad = model, grad

    def __call__(self, batch: Batch) -> Signals:
        """Both sides, one pass each."""
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            said = {side: call(self.model, batch.inputs[side]) for side in SIDES}
        exits = {side: list(value) if isinstance(value, (list, tuple)) else [value] for side, value in said.items()}
        for side, values in exits.items():
            if not all(isinstance(value, Tensor) and value.ndim == 2 for value in values):
                raise UserError(
                    f"{type(self.model).__name__} gives no embeddings (B, D) of the {side}",
                    "use bert, minilm or hf:<encoder>, which are pooled here, or a module of your own that pools",
                )
        return Signals(at=exits, **{side: values[-1] for side, values in exits.items()})


@dataclass(frozen=True)
class Embedding(Task):
    """Which document belongs to a query.

    Attributes:
        text: the tokenizer and what belongs to it.
        scale: of the cosines in the contrastive loss, 1 / temperature; 20 is the habit of sentence encoders.
        pool: candidates that a query is ranked among when it is measured.
    """

    family: ClassVar[str] = "embedding"

    text: Text
    scale: float = 20.0
    pool: int = 500
    kind: str = "embedding"

    @property
    def primary(self) -> str:
        """ "mrr": the mean of one over the rank of the right document."""
        return "mrr"

    def reader(self, model: nn.Module, wants: Sequence[str], **options: Any) -> EmbeddingReader:
        """An `EmbeddingReader`."""
        return EmbeddingReader(model, wants, **options)

    def pair_loss(self, said: Signals) -> Tensor:
        """Queries find their documents among those of the batch, and documents their queries (symmetric InfoNCE)."""
        return info_nce(said.query, said.document, temperature=1 / self.scale, symmetric=True)

    def hard_loss(self, said: Any, labels: Tensor, **options: Any) -> Tensor:
        """`pair_loss`; the pairs are the labels."""
        return self.pair_loss(said)

    def soft_loss(self, student: Any, teacher: Any, temperature: float = 1.0) -> Tensor:
        """1 - cosine between the student's and the teacher's embeddings, a mean over both sides."""
        return sum((1 - (getattr(student, side) * getattr(teacher, side)).sum(-1)).mean() for side in SIDES) / 2

    def check_student(self, said: Signals) -> None:
        """Embeddings were read."""
        _ = said.query, said.document

    def check_pair(self, student: Signals, teacher: Signals) -> None:
        """Nothing: widths may differ, methods compare similarities or project."""

    def chance(self, labels: Tensor | None, samples: int | None = None) -> float:
        """The expected reciprocal rank of a random order of the candidates: `pool`, or the whole split where it is smaller."""
        count = self.pool if samples is None else min(self.pool, samples)
        return sum(1 / rank for rank in range(1, count + 1)) / count

    @torch.no_grad()
    def embed(self, model: Any, split: Split, batch: int, device: torch.device) -> dict[str, list[Tensor]]:
        """Embeddings of a whole split on the CPU: for each side a list with one `(N, D)` for each exit, in the split's order."""
        from limbeck.data.batches import Batches
        from limbeck.data.text.retrieval import RetrievalSplit

        read = self.reading(model, ())
        order, parts = torch.arange(len(split)), Batches(split, batch, shuffle=False).epoch(0)
        if isinstance(split, RetrievalSplit):
            order = split.by_length()
            parts = (split.batch(index) for index in order.split(batch))
        found: dict[str, list[list[Tensor]]] = {side: [] for side in SIDES}
        with evaluating(model):
            for part in parts:
                said = read(part.to(device))
                for side in SIDES:
                    found[side].append([value.float().cpu() for value in said.at[side]])
        back = order.argsort()
        return {side: [torch.cat(values)[back] for values in zip(*rows)] for side, rows in found.items()}

    def figures(self, queries: Tensor, documents: Tensor) -> dict[str, float]:
        """recall@1, 5 and 10, mrr and nDCG@10 among `pool` candidates (all, where there are fewer)."""
        from limbeck.evaluation.text import retrieval

        pool = self.pool if len(queries) > self.pool else None
        found = retrieval(queries, documents, pool=pool)
        return {name: value for name, value in found.items() if name not in ("queries",)}

    def measure(
        self, model: nn.Module | Callable[[Batch], Signals], split: Split, batch: int, device: torch.device, full: bool = False
    ) -> Measured:
        """The figures of the last exit."""
        rows = self.embed(model, split, batch, device)
        return Measured(self.figures(rows["query"][-1], rows["document"][-1]))

    def cost_inputs(self, model: nn.Module, batch: Batch) -> Any:
        """A document."""
        return batch.inputs["document"]

    def speed(self, model: nn.Module, inputs: Any) -> dict[str, float]:
        """`texts_per_second` in batches of 16: encoders are run on many texts at once, where Python's own time counts for little."""
        from limbeck.evaluation.cost import cost

        return {"texts_per_second": 16_000 / cost(model, inputs, repeats=9, warmup=2, batch=16).latency_ms}
