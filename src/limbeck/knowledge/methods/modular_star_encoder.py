"""ModularStarEncoder: an encoder with several exits, all trained at once; any of them can be kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.losses import info_nce
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals
from limbeck.zoo.sentence import SentenceEncoder, first_layers, head, layers_of, pool

REMEMBERED = 5000
"""Samples up to which a teacher's embeddings are remembered over epochs."""


class MultiExit(nn.Module):
    """An encoder whose layers at `exits` each give an embedding through a head of their own (layer norm, matrix, length 1)."""

    def __init__(self, encoder: nn.Module, exits: tuple[int, ...], pooling: str, out: int) -> None:
        super().__init__()
        self.encoder, self.exits, self.pooling = encoder, exits, pooling
        self.heads = nn.ModuleList(head(encoder.config.hidden_size, out) for _ in exits)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> list[Tensor]:
        """Embeddings `(B, D)` of every exit, shallow to deep."""
        said = self.encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **inputs)
        states = [said.hidden_states[layer] for layer in self.exits]
        return [F.normalize(part(pool(state, attention_mask, self.pooling)), dim=-1) for part, state in zip(self.heads, states)]

    def cut(self, place: int) -> SentenceEncoder:
        """The exit number `place` as an encoder of its own: only the layers up to it."""
        return SentenceEncoder(first_layers(self.encoder, self.exits[place]), self.pooling, self.heads[place])


@dataclass
class ModularStarEncoder(Distiller):
    """Every exit learns the same task; deep exits weigh more, and their gradients pull the shared lower layers up.

    loss = sum_i a_i [ (CE(S_i, diag) + CE(S_i^T, diag)) / 2 + teaching * mean(1 - cos(u_i, t)) ],  a_i = i / n
    S_i = scale u_i w_i^T of the batch's queries u_i and documents w_i at exit i of n layers, t the teacher's embedding of the same text
    (only with a teacher; the paper has none). One exit is kept: its layers and its head, nothing of the others.
    """

    card = Card(
        id="modular-star-encoder",
        title="One Model to Train them All: Hierarchical Self-Distillation for Enhanced Early Layer Embeddings",
        year=2025,
        arxiv="2503.03008",
        wing="knowledge",
        family="language",
        claim="Weighted losses at several layers make every cut of an encoder a good encoder, better than one trained at its top alone.",
        equation="sum_i (i/n) InfoNCE(exit i)",
        baseline="alone",
        certainty="paper-text",
        deviations="Pooling is that of the student (mean for BERT-like encoders). Each exit has a layer norm of its own. The pre-training "
        "losses (masked tokens, same repository or not) are left out: the student starts from weights. The teacher's term is ours.",
    )
    tasks: ClassVar[tuple[str, ...]] = ("embedding",)
    teacher_kind: ClassVar[str] = "frozen"

    exits: list[int] = setting([], "layers that give an embedding; none: all of them")  # noqa: RUF009
    weights: str = setting("depth", "a_i = i / n, or the same for all", choices=("depth", "equal"))
    keep: int = setting(0, "the exit (a layer's number) that becomes the student; 0 for the deepest", at_least=0)
    scale: float = setting(20.0, "of the cosines; the paper has 10, sentence encoders 20", above=0)
    contrastive: float = setting(1.0, "weight of the retrieval loss", at_least=0)
    teaching: float = setting(1.0, "weight of the teacher's embeddings; 0 is the paper, which has no teacher", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teaching:
            self.teacher_kind = "none"  # type: ignore[misc]

    def wrap(self, student: nn.Module, example: Batch) -> nn.Module:
        """The student's encoder with a head at every exit.

        Raises:
            UserError: the student is no sentence encoder, it has no such layer, or its exits cannot be cut out.
        """
        if not isinstance(student, SentenceEncoder):
            raise UserError(f"{self.card.id} is for sentence encoders, not {type(student).__name__}", "use bert, minilm or hf:<encoder>")
        count = len(layers_of(student.encoder))
        exits = tuple(sorted(set(self.exits))) or tuple(range(1, count + 1))
        if exits[0] < 1 or exits[-1] > count:
            raise UserError(f"exits {list(exits)} of an encoder of {count} layers", f"give layers from 1 to {count}")
        if self.keep and self.keep not in exits:
            raise UserError(f"keep is {self.keep}, and the exits are {list(exits)}", "keep one of the exits")
        self._count = count
        with torch.no_grad():
            width = student(**example.inputs["query"]).shape[-1]
        made = MultiExit(student.encoder, exits, student.pooling, width).to(next(student.parameters()).device)
        self._check_cut(made, example)
        return made

    def _check_cut(self, made: MultiExit, example: Batch) -> None:
        """An exit that is cut out must say what it says inside; a norm behind the last layer would come to stand behind every cut."""
        inputs, mode = example.inputs["query"], made.training
        made.eval()
        with torch.no_grad():
            same = torch.allclose(made.cut(0).eval()(**inputs), made(**inputs)[0], atol=1e-3)
        made.train(mode)
        if not same:
            raise UserError(
                f"{type(made.encoder).__name__} does more behind its last layer than its layers do, so a shallow exit cannot be cut out",
                "use an encoder of the BERT family, or exits: [<the last layer>]",
            )

    def setup(self, pair: Pair) -> None:
        """Give the heads the teacher's width where there is a teacher."""
        assert isinstance(pair.student, MultiExit)
        if not self.teaching:
            return
        width = pair.teacher_signals.query.shape[-1]
        if len(pair.data.train) <= REMEMBERED:
            blank = torch.zeros(len(pair.data.train), 2, width, device=pair.device)
            self.state = {"said": blank, "seen": torch.zeros(len(blank), dtype=torch.bool, device=pair.device)}
        if width != pair.student_signals.query.shape[-1]:
            pair.student.heads = nn.ModuleList(head(pair.student.encoder.config.hidden_size, width) for _ in pair.student.exits)
            pair.student.to(pair.device)

    def _shares(self, exits: tuple[int, ...]) -> list[float]:
        return [layer / self._count if self.weights == "depth" else 1.0 for layer in exits]

    def _taught(self, batch: Batch, models: Models) -> Signals:
        """The teacher's embeddings; of small sets each text is read once and remembered (in checkpoints: resuming changes no bit)."""
        if "said" not in self.state or batch.index is None:
            return models.teacher(batch)
        index = batch.index.to(self.state["seen"].device)
        if not bool(self.state["seen"][index].all()):
            said = models.teacher(batch)
            self.state["said"][index] = torch.stack([said.query, said.document], 1).float()
            self.state["seen"][index] = True
        rows = self.state["said"][index]
        return Signals(query=rows[:, 0], document=rows[:, 1])

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """`exit<i>` for every exit i, and `teaching<i>`."""
        teacher = self._taught(batch, models) if self.teaching else None
        student = models.student(batch)
        terms: dict[str, Tensor] = {}
        exits = models.module.exits
        for place, (layer, share) in enumerate(zip(exits, self._shares(exits))):
            query, document = student.at["query"][place], student.at["document"][place]
            if self.contrastive:
                value = info_nce(query, document, temperature=1 / self.scale, symmetric=True)
                terms[f"exit{layer}"] = self.contrastive * share * value
            if teacher is not None:
                gaps = [1 - (own * other).sum(-1).mean() for own, other in ((query, teacher.query), (document, teacher.document))]
                terms[f"teaching{layer}"] = self.teaching * share * sum(gaps) / 2
        return terms

    def finish(self, student: nn.Module, models: Models, data: Any) -> nn.Module:
        """The exit that is kept, as an encoder of its own."""
        self._whole = student
        exits = student.exits
        return student.cut(exits.index(self.keep) if self.keep else len(exits) - 1)

    def figures(self, student: nn.Module, data: Any, task: Any, device: torch.device) -> dict[str, float]:
        """`mrr@exit<i>` of every exit."""
        rows = task.embed(self._whole, data.test, 64, device)
        return {
            f"mrr@exit{layer}": task.figures(query, document)["mrr"]
            for layer, query, document in zip(self._whole.exits, rows["query"], rows["document"])
        }
