"""MatryoshkaKV: a smaller key-value cache by trained rotations, of which only the first coordinates are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.decoding.cached import evaluating
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.errors import UserError
from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.knowledge.on_policy import prompts_of
from limbeck.knowledge.rank_search import calibration, random_ranks, search_ranks, start_at_random, start_from_data
from limbeck.losses import vocabulary
from limbeck.method import Card, setting
from limbeck.signals.signals import Signals
from limbeck.storage import tensors_fingerprint
from limbeck.zoo.rotated_decoder import RotatedDecoder, cache_bytes

_AGREE = 1e-3
"""Greatest difference between the logits of the teacher and of the student at full ranks, as a share of the largest logit."""


@dataclass
class MatryoshkaKV(Distiller):
    """The teacher itself, frozen, with trainable orthogonal rotations of its keys and values; write `student: teacher`.

    stored (for each layer and key/value head, behind the rotary embedding): k~ = ((k - m_k) U_k)[:r_k], v~ = ((v - m_v) U_v)[:r_v]
    scores (q U_k)[:r_k] . k~ / sqrt(d);  output (softmax v~)(U_v[:, :r_v])^T + m_v;  U = (I - A/2)^-1 (I + A/2), A = X - X^T
    loss = soft_weight T^2 KL(teacher || student at random ranks) + (1 - soft_weight) CE(student, text),  means over scored tokens
    In each step every layer, head and kind draws its rank from {d/8, 2d/8, ..., d}. Afterwards ranks are lowered greedily until their mean
    is within `budget`. The student begins as the teacher's principal directions on training texts.
    """

    card = Card(
        id="matryoshkakv",
        title="MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal Projection",
        year=2024,
        arxiv="2410.14731",
        wing="knowledge",
        family="language",
        claim="Trained rotations keep over 90 % of performance at 60 % compression of the cache on average, 75 % in some cases.",
        equation="0.25 T^2 KL(p || q_r) + 0.75 CE(q_r, y), r ~ U{d/8, ..., d} for each layer and head; cache ((k - m) U)[:r]",
        baseline="alone",
        certainty="verified-in-code",
        deviations="The term q . m_k of the scores and the training of m_k are left out: it is the same for all keys of a query and drops "
        "out of the softmax, so it changes nothing and gives m_k no gradient. One rotation for each key/value head; the released code "
        "gives every query head its own, which a real cache cannot hold. Signs of starting directions are chosen so that the Cayley "
        "transform reaches them (the released code turns one column where the determinant is negative). Calibration reads training "
        "texts, no generated ones.",
    )
    tasks: ClassVar[tuple[str, ...]] = ("language",)
    student_wants: ClassVar[tuple[str, ...]] = ("law",)
    teacher_wants: ClassVar[tuple[str, ...]] = ("law",)

    soft_weight: float = setting(0.25, "weight of the divergence; the text itself gets the rest", at_least=0, at_most=1)
    temperature: float = setting(1.0, "T of the divergence", above=0)
    train: bool = setting(True, "False: rotations stay as they start, which is PCA compression")
    init: str = setting("pca", "start of the rotations", choices=("pca", "pca-without-mean", "random"))
    parts_of_head: int = setting(8, "training ranks are multiples of the head's size over this; 16 to 128 of 128 in the paper", at_least=1)
    fixed_rank: float = setting(0.0, "share of the head kept in every training step; 0 draws ranks at random", at_least=0, at_most=1)
    budget: float = setting(0.5, "mean share of coordinates that is kept after the search; d/2 in the paper", above=0, at_most=1)
    search_step: float = setting(0.25, "share of a head by which a rank is lowered, and the least rank; 32 of 128 in the paper", above=0)
    search_share: float = setting(0.75, "share of entries lowered in one round; 1536 of 2048 in the paper", above=0, at_most=1)
    samples: int = setting(64, "training texts for principal directions and, a quarter of them, for the search", at_least=4)

    def wrap(self, student: nn.Module, example: Batch) -> nn.Module:
        """The student with rotations in its attention layers; everything else is frozen.

        Raises:
            UserError: sequence-to-sequence, or attention layers that cannot be rotated.
        """
        if self.task.kind != "causal-lm":
            raise UserError(f"matryoshkakv is for causal models, and this is a {self.task.kind} task", "use a decoder of the Llama family")
        return RotatedDecoder(student.requires_grad_(False))

    def setup(self, pair: Pair) -> None:
        """Check that the student is the teacher, and give the rotations their start.

        Raises:
            UserError: other weights than the teacher's, or an architecture whose attention does not run through the rotations.
        """
        student, teachers = pair.student, list(pair.teacher.networks().values())
        assert isinstance(student, RotatedDecoder)
        own = {name: t for name, t in student.base.state_dict().items() if ".rotation." not in name}
        if len(teachers) != 1 or tensors_fingerprint(own) != tensors_fingerprint(teachers[0].state_dict()):
            raise UserError("matryoshkakv changes the teacher's own cache, and the student has other weights", "write `student: teacher`")
        self._teacher, self._width, self._device = teachers[0], student.rotations()[0].width, pair.device
        batches = calibration(pair.data.train, self.samples, 16, pair.device)
        if self.init == "random":
            start_at_random(student)
        else:
            start_from_data(student, batches, centred=self.init == "pca")
        self._check_full(student, pair)
        student.set_ranks(self._rank(self.budget))

    def _check_full(self, student: RotatedDecoder, pair: Pair) -> None:
        """At full ranks the student says what the teacher says."""
        with evaluating(student):
            said, meant = pair.read_student(pair.example).law.logits(), pair.teacher(pair.example).law.logits()
        if not torch.allclose(said, meant, rtol=0, atol=_AGREE * float(meant.abs().max().clamp_min(1))):
            raise UserError(
                f"with rotated keys and values {type(student.base).__name__} says something else even at full ranks",
                "its attention does more than that of the Llama family: use such a model",
            )

    def _rank(self, share: float) -> int:
        return max(1, round(share * self._width))

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        """The student's alone, without weight decay: a decayed X would turn towards no rotation at all."""
        learned = [p for p in pair.student.parameters() if p.requires_grad]
        return {"student": make_optimizer(pair.training, learned, weight_decay=0.0, **({} if self.train else {"lr": 0.0}))}

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """`kl` and `ce` at ranks of this step."""
        student = models.module
        assert isinstance(student, RotatedDecoder)
        teacher = models.teacher(batch)
        with student.at(self._training_ranks(student)):
            said = models.student(batch)
        return self.loss(batch, said, teacher, clock)

    def _training_ranks(self, student: RotatedDecoder) -> Tensor | int:
        if self.fixed_rank:
            return self._rank(self.fixed_rank)
        layers, _, heads = student.ranks.shape
        return random_ranks(layers, heads, self._width, self.parts_of_head)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`kl` and `ce`, unless one has all the weight."""
        terms: dict[str, Tensor] = {}
        if self.soft_weight:
            kl = vocabulary.divergence(student.law, teacher.law, "forward", temperature=self.temperature, scale_temperature=True)
            terms["kl"] = self.soft_weight * kl
        if self.soft_weight < 1:
            terms["ce"] = (1 - self.soft_weight) * self.hard(batch, student.law)
        return terms

    def finish(self, student: nn.Module, models: Models, data: Any) -> nn.Module:
        """The student at the ranks that the search finds on a quarter of the calibration texts."""
        assert isinstance(student, RotatedDecoder)
        batches = calibration(data.train, max(1, self.samples // 4), 16, self._device)
        read = self.task.reader(student, ("law",), grad=False)

        def hidden(ranks: Tensor) -> Tensor:
            student.set_ranks(ranks)
            laws = [read(batch).law for batch in batches]
            return torch.cat([law.logits() if law.hidden is None else law.hidden.float() for law in laws])

        lowest = self._rank(self.search_step)
        with evaluating(student):
            start = torch.full_like(student.ranks, self._width)
            student.set_ranks(search_ranks(hidden, start, self.budget * self._width, lowest, lowest, self.search_share))
        return student

    def figures(self, student: nn.Module, data: Any, task: Any, device: torch.device) -> dict[str, float]:
        """What the cut costs and saves.

        `nll@rank<r>`: all ranks r, for d, 3d/4, d/2 and d/4 (d is the teacher); `nll@searched`: the ranks that were found; `mean_rank`
        of them; `kv_bytes_per_token` of the cache as it lies in memory, and `kv_bytes_per_token_full` of the teacher's.
        """
        assert isinstance(student, RotatedDecoder)

        def nll() -> float:
            return task.measure(student, data.test, 32, device).metrics["nll"]

        found = {"mean_rank": float(student.ranks.double().mean()), "nll@searched": nll()}
        for share in (1.0, 0.75, 0.5, 0.25):
            rank = self._rank(share)
            with student.at(rank):
                found[f"nll@rank{rank}"] = nll()
        index = torch.arange(min(8, len(data.test)))
        ids, _ = prompts_of(data.test, data.test.batch(index).to(device), 16)
        for name, model in (("kv_bytes_per_token", student), ("kv_bytes_per_token_full", self._teacher)):
            with evaluating(model):
                found[name] = cache_bytes(model(input_ids=ids, use_cache=True).past_key_values) / ids.numel()
        return found
