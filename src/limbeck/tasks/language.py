"""Language modelling: what comes next in a text (causal), or in a target given a source (sequence to sequence)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from limbeck import processes
from limbeck.data.batch import Batch
from limbeck.errors import UserError, unknown
from limbeck.losses import vocabulary as losses
from limbeck.signals.language import LanguageReader, scored, targets
from limbeck.signals.modes import evaluating
from limbeck.tasks.base import Measured, Task

if TYPE_CHECKING:
    from limbeck.data.split import Split
    from limbeck.data.text import Text
    from limbeck.losses.vocabulary import Law, Sparse
    from limbeck.signals import Signals

_KINDS = ("causal-lm", "seq2seq")


@dataclass(frozen=True)
class Writing:
    """How text is written when a model is measured.

    Attributes:
        prompts: of the split, from its beginning; 0 writes nothing.
        tokens: the most that are written for a prompt.
        temperature: 0 takes the likeliest token.
        batch: prompts at a time.
    """

    prompts: int = 0
    tokens: int = 64
    temperature: float = 0.0
    batch: int = 16


@dataclass(frozen=True)
class Language(Task):
    """Which token comes next.

    Labels are token ids `(B, L)`, -100 where a token is not scored; what the losses take is a `Law` (or a stored teacher's `Sparse`) of the
    N scored positions, never logits of the whole batch.

    Attributes:
        text: the tokenizer and what belongs to it.
        kind: "causal-lm" or "seq2seq".
        writing: what is written when a model is measured to the full.
    """

    family: ClassVar[str] = "language"

    text: Text
    kind: Literal["causal-lm", "seq2seq"] = "causal-lm"
    writing: Writing = field(default_factory=Writing)
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise unknown("kind of language task", self.kind, _KINDS)

    @property
    def primary(self) -> str:
        """ "nll": mean negative log-likelihood of a scored token, in nats."""
        return "nll"

    # ---- reading ----

    def reader(self, model: nn.Module, wants: Sequence[str], **options: Any) -> LanguageReader:
        """A `LanguageReader` of this tokenizer's width."""
        return LanguageReader(model, wants, kind=self.kind, vocabulary=self.text.vocabulary, **options)

    def check_student(self, said: Signals) -> None:
        """There is a law, as wide as the tokenizer."""
        self._check_width(said.law.width, "the student")

    def _check_width(self, width: int, who: str) -> None:
        if width != self.text.vocabulary:
            raise UserError(
                f"{who} speaks of {width} tokens, the tokenizer has {self.text.vocabulary}",
                "teacher and student read the same tokens; for different tokenizers use method universal-logit",
            )

    def check_pair(self, student: Signals, teacher: Signals) -> None:
        """Teacher and student speak of the same tokens at as many positions."""
        if "law" not in teacher:
            return
        self._check_width(teacher.law.width, "the teacher")
        if "law" in student and len(teacher.law) != len(student.law):
            raise UserError(
                f"the teacher speaks of {len(teacher.law)} positions, the student of {len(student.law)}",
                "stored outputs belong to the very texts that they were made from: store them again with `limbeck cache`",
            )

    def targets(self, labels: Tensor) -> Tensor:
        """`(N,)` the scored tokens."""
        return targets(labels, self.kind)

    def mask(self, labels: Tensor) -> Tensor:
        """`(B, L')` bool: which predictions are scored (L' = L - 1 of causal models)."""
        return scored(labels, self.kind)

    def scored(self, batch: Batch) -> Tensor:
        """The number of scored tokens."""
        assert batch.labels is not None
        return self.mask(batch.labels).sum()

    # ---- losses ----

    def hard_loss(self, said: Law, labels: Tensor, complete: bool = True, **options: Any) -> Tensor:
        """Cross-entropy of the scored tokens, a mean over them; options as of `limbeck.losses.vocabulary.cross_entropy`."""
        return losses.cross_entropy(said, self.targets(labels), **options)

    def soft_loss(self, student: Law, teacher: Law | Sparse, temperature: float = 1.0, **options: Any) -> Tensor:
        """Forward KL times T^2, a mean over the scored positions."""
        return losses.divergence(student, teacher, "forward", temperature=temperature, scale_temperature=True, **options)

    def chance(self, labels: Tensor | None, samples: int | None = None) -> float:
        """ln V: what a model that gives every token the same probability has."""
        return math.log(self.text.vocabulary)

    # ---- measuring ----

    def _batches(self, split: Split, batch: int, device: torch.device) -> Any:
        from limbeck.data.batches import Batches

        return (part.to(device) for part in Batches(split, batch, shuffle=False).epoch(0))

    @torch.no_grad()
    def measure(
        self, model: nn.Module | Callable[[Batch], Signals], split: Split, batch: int, device: torch.device, full: bool = False
    ) -> Measured:
        """nll, perplexity, bits_per_byte (where the split knows its bytes); to the full also rouge_l and exact_match of written texts."""
        from limbeck.evaluation.predict import shared_batches
        from limbeck.evaluation.text import bits_per_byte, perplexity

        read = self.reading(model, ("law",))
        total, count = torch.zeros((), dtype=torch.float64), 0
        with evaluating(model):
            for part, counts in shared_batches(split, batch):
                part = part.to(device)
                law = read(part).law
                if counts:
                    total += losses.cross_entropy(law, self.targets(part.labels), reduction="sum").double().cpu()
                    count += len(law)
        total, count = processes.summed(total), int(processes.summed(torch.tensor(count)))
        if not count:
            raise UserError("the split has no scored token, so nothing can be measured", "give texts of more than one token")
        nll = float(total)
        metrics = {"nll": nll / count, "perplexity": perplexity(min(nll, 700.0 * count), count)}  # JSON knows no infinity
        size = getattr(split, "bytes", None)
        if size is not None and int(size.sum()):
            metrics["bits_per_byte"] = bits_per_byte(nll, int(size.sum()))
        texts: list[dict[str, str]] = []
        if full and isinstance(model, nn.Module) and self.writing.prompts and hasattr(split, "prompts"):
            figures, texts = self._written(model, split, device)
            metrics |= figures
        return Measured(metrics, texts=texts)

    def _written(self, model: nn.Module, split: Any, device: torch.device) -> tuple[dict[str, float], list[dict[str, str]]]:
        """What the model writes for the first prompts of a split, and how near it is to the references."""
        from limbeck.evaluation.text import distinct_n, exact_match, rouge_l

        count = min(self.writing.prompts, len(split))
        written: list[str] = []
        for first in range(0, count, self.writing.batch):
            written += self.write(model, split, torch.arange(first, min(first + self.writing.batch, count)), device)
        index = torch.arange(count)
        references, prompts = split.references(index), split.prompt_texts(index)
        figures = {"rouge_l": rouge_l(written, references)["f"], "exact_match": exact_match(written, references)}
        if (spread := distinct_n(written, 2)) is not None:
            figures["distinct_2"] = spread
        rows = [{"prompt": p, "reference": r, "written": w} for p, r, w in zip(prompts, references, written)]
        return figures, rows[:8]

    def write(
        self, model: nn.Module, split: Any, index: Tensor, device: torch.device, generator: torch.Generator | None = None
    ) -> list[str]:
        """Texts that a model writes for the prompts at `index`; none gets longer than the samples of the data."""
        from limbeck.decoding import generate

        ids, mask = split.prompts(index)
        room = self.writing.tokens if self.kind == "seq2seq" else min(self.writing.tokens, self.text.length - ids.shape[1])
        made = generate(
            model,
            ids.to(device),
            mask.to(device),
            new_tokens=max(room, 1),
            temperature=self.writing.temperature,
            eos=self.text.eos,
            pad=self.text.pad,
            generator=generator,
            vocabulary=self.text.vocabulary,
        )
        rows = [row[keep].tolist() for row, keep in zip(made.ids.cpu(), made.mask.cpu())]
        return self.text.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def cost_inputs(self, model: nn.Module, batch: Batch) -> Any:
        """The inputs, of seq2seq with those of the decoder."""
        return self.reader(model, ("law",), grad=False).inputs(batch) if hasattr(model, "config") else batch.inputs

    @torch.no_grad()
    def compare(self, student: Any, teacher: Any, split: Split, batch: int, device: torch.device) -> dict[str, float]:
        """kl (teacher from student), acceptance (of the student's tokens by the teacher: sum_v min(p, q)), agreement of the first choice.

        Means over the scored tokens; see `limbeck.losses.vocabulary.overlap`.
        """
        totals, count = torch.zeros(3, dtype=torch.float64), 0
        readers = [self.reading(model, ("law",)) for model in (student, teacher)]
        with evaluating(student, teacher):
            for part in self._batches(split, batch, device):
                own, other = (read(part).law for read in readers)
                if own.width != other.width or len(own) != len(other):
                    return {}
                divergence = losses.divergence(own, other, "forward", reduction="sum")
                rows = [divergence, losses.overlap(other, own).sum(), losses.agreement(other, own).sum()]
                totals += torch.stack([row.double().cpu() for row in rows])
                count += len(own)
        kl, acceptance, agreement = (totals / max(count, 1)).tolist()
        return {"kl": kl, "acceptance": acceptance, "agreement": agreement}
