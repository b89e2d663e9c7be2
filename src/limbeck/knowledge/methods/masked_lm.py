"""Masked language modelling: how encoders of text are pre-trained on texts without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.errors import UserError
from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.losses import vocabulary
from limbeck.losses.vocabulary import Law
from limbeck.method import Card, setting


class _Head(nn.Module):
    """`(N, width)` hidden states to `(N, D)` what the token embedding is multiplied with, and a bias for each token (as in BERT)."""

    def __init__(self, width: int, inner: int, tokens: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.LayerNorm(inner))
        self.bias = nn.Parameter(torch.zeros(tokens))

    def forward(self, states: Tensor) -> Tensor:
        return self.layers(states)


@dataclass
class MaskedLM(Distiller):
    """Some tokens are hidden and guessed from the others; there is no teacher and no label is used.

    loss = CE(softmax(E W h_i + b), token_i), mean over the hidden tokens; E is the encoder's own token embedding, W a trained square
    matrix, both of them left behind with the head. Of the hidden tokens 80 % become the mask token, 10 % a random one, 10 % stay.
    """

    card = Card(
        id="masked-lm",
        title="BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (its masked objective)",
        year=2018,
        arxiv="1810.04805",
        wing="knowledge",
        family="baseline",
        claim="Pre-training on masked tokens; here it makes teachers and starts of students.",
        equation="CE(E W h_i, token_i) over hidden i",
        baseline="",
        certainty="verified-in-code",
    )
    teacher_kind: ClassVar[str] = "none"
    teacher_wants: ClassVar[tuple[str, ...]] = ()
    student_wants: ClassVar[tuple[str, ...]] = ("logits", "stages")

    share: float = setting(0.15, "of the tokens that are hidden (BERT)", above=0, at_most=1)

    def setup(self, pair: Pair) -> None:
        """Find the token embedding and build the head.

        Raises:
            UserError: the student reads no tokens, or the tokenizer has no mask token.
        """
        text = pair.data.text
        get = getattr(pair.student, "get_input_embeddings", None)
        if text is None or get is None:
            raise UserError("masked-lm is for encoders of text", "use a text source such as stdlib-windows and a network such as bert")
        mask = text.tokenizer.mask_token_id
        if mask is None:
            raise UserError("the tokenizer has no mask token", "use a tokenizer of an encoder, or bpe:<size>, which has one")
        embedding = get()
        self._embedding, self._mask, self._vocabulary = embedding, int(mask), text.vocabulary
        self.parts["head"] = _Head(pair.student_signals.stages[-1].shape[-1], *reversed(embedding.weight.shape))
        self._special = torch.tensor(sorted(text.tokenizer.all_special_ids), device=pair.device)

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """`masked`."""
        ids = batch.inputs["input_ids"]
        hidden = (torch.rand(ids.shape, device=ids.device) < self.share) & ~torch.isin(ids, self._special)
        if "attention_mask" in batch.inputs:
            hidden &= batch.inputs["attention_mask"].bool()
        fate = torch.rand(ids.shape, device=ids.device)
        shown = torch.where(hidden & (fate < 0.8), torch.full_like(ids, self._mask), ids)
        random = torch.randint(self._vocabulary, ids.shape, device=ids.device)
        shown = torch.where(hidden & (fate >= 0.9), random, shown)
        inputs: dict[str, Any] = {**batch.inputs, "input_ids": shown}
        states = models.student(batch.replace(inputs=inputs)).stages[-1]
        head = self.parts["head"]
        law = Law(head(states[hidden]), self._embedding.weight, head.bias, vocabulary=self._vocabulary)
        return {"masked": vocabulary.cross_entropy(law, ids[hidden])}
