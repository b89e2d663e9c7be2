"""Correction of a student's own text: its worst token is replaced by the teacher's, and the student writes on from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.decoding import generate, sample
from limbeck.decoding.cached import Cached, evaluating
from limbeck.errors import UserError
from limbeck.knowledge.on_policy import Writer, prompts_of, room_to_write, written_batch
from limbeck.losses import vocabulary
from limbeck.losses.vocabulary import Law


@dataclass(frozen=True)
class Draft:
    """Texts behind prompts.

    Attributes:
        prompts, mask: `(B, P)` padded on the left.
        ids, kept: `(B, n)` written tokens; `kept` is false behind the end of a text.
    """

    prompts: Tensor
    mask: Tensor
    ids: Tensor
    kept: Tensor


def error_tokens(distance: Tensor, written: Tensor, choice: Tensor, open_: Tensor) -> tuple[Tensor, Tensor]:
    """Where each text is to be corrected: among tokens that differ from the teacher's choice the one with the largest distance.

    Args:
        distance: `(B, n)` KL(teacher || student) at each written token.
        written, choice: `(B, n)` the student's token and the teacher's likeliest one.
        open_: `(B, n)` bool: tokens that may be corrected.

    Returns:
        Positions `(B,)` and whether there is one `(B,)` (no candidate: the text stays as it is).
    """
    candidates = open_ & (written != choice)
    scored = distance.masked_fill(~candidates, -torch.inf)
    return scored.argmax(1), candidates.any(1)


def rewrite(
    model: nn.Module,
    draft: Draft,
    place: Tensor,
    token: Tensor,
    *,
    tokens: int,
    temperature: float = 1.0,
    top_p: float | None = None,
    eos: int | None,
    pad: int,
    vocabulary: int | None = None,
) -> Draft:
    """Every text up to its `place`, `token` there, and what the model writes after it; no gradient.

    Args:
        model: a causal language model with a cache.
        draft: texts of n <= `tokens` tokens.
        place, token: `(B,)`.
        tokens: the most that a text holds.
        temperature, top_p, eos, pad, vocabulary: as of `limbeck.decoding.generate`.
    """
    first = int(place.min())
    out = draft.ids.new_full((len(draft.ids), tokens), pad)
    out[:, : draft.ids.shape[1]] = draft.ids
    kept = torch.zeros_like(out, dtype=torch.bool)
    kept[:, :first] = True
    mask = draft.mask.bool()
    live = torch.ones_like(place, dtype=torch.bool)
    with evaluating(model):
        reader = Cached(model, None if bool(mask.all()) else mask, tokens, vocabulary)
        fed = torch.cat([draft.prompts, out[:, :first]], 1)
        for step in range(first, tokens):
            drawn = sample(reader.feed(fed)[:, -1], temperature, top_p=top_p)
            drawn = torch.where(place == step, token, torch.where(place > step, out[:, step], drawn))
            out[:, step] = torch.where(live, drawn, pad)
            kept[:, step] = live
            if eos is not None:
                live = live & ((drawn != eos) | (place > step))
            if not bool(live.any()):
                break
            fed = out[:, step : step + 1]
    length = int(kept.sum(1).max())
    return Draft(draft.prompts, draft.mask, out[:, :length], kept[:, :length])


class Reviser:
    """Writes texts with the student and corrects them by the teacher (SCRG of MGSR, arXiv 2407.10068).

    Args:
        writer: how the student writes.
        corrections: at most so many for each text, one after the other; each behind the one before.
        text: the data's `Text`.
    """

    def __init__(self, writer: Writer, corrections: int, text: Any) -> None:
        if text.pad is None:
            raise UserError("the tokenizer has no padding token, and written texts differ in length", "set text.pad=eos")
        self.writer, self.corrections, self.text = writer, corrections, text

    def __call__(self, models: Any, split: Any, batch: Batch) -> tuple[Batch, Tensor]:
        """Revised texts behind the batch's prompts, scored on what was written; and how many corrections were made.

        Args:
            models: `limbeck.knowledge.distiller.Models`; both sides are read without gradient.
            split: of the data that the batch came from.
            batch: whose prompts.

        Raises:
            UserError: prompts that leave no room in `text.length`.
        """
        prompts, mask = prompts_of(split, batch, self.writer.prompt)
        room = room_to_write(self.writer.tokens, prompts, self.text.length)
        options = {"temperature": self.writer.temperature, "top_p": self.writer.top_p, "eos": self.text.eos, "pad": self.text.pad}
        options["vocabulary"] = self.text.vocabulary
        made = generate(models.module, prompts, mask, new_tokens=room, **options)
        draft = Draft(prompts, mask, made.ids, made.mask)
        after = torch.full_like(prompts[:, 0], -1)
        count = torch.zeros((), dtype=torch.int64, device=prompts.device)
        for _ in range(self.corrections):
            open_ = draft.kept & (torch.arange(draft.ids.shape[1], device=after.device) > after.unsqueeze(1))
            distance, choice = self._judged(models, draft, batch)
            place, found = error_tokens(distance, draft.ids, choice, open_)
            if not bool(found.any()):
                break
            token = choice.gather(1, place.unsqueeze(1)).squeeze(1)
            draft = self._corrected(models.module, draft, found, place, token, room, options)
            after = torch.where(found, place, torch.full_like(after, room))
            count = count + found.sum()
        return self.batch(draft, batch), count

    def batch(self, draft: Draft, batch: Batch) -> Batch:
        """The texts as a batch, padded on the right."""
        made = written_batch(draft.prompts, draft.mask, draft.ids, draft.kept, batch, self.text.pad)
        return made.replace(extra={key: value for key, value in made.extra.items() if key != "share"})

    @torch.no_grad()
    def _judged(self, models: Any, draft: Draft, batch: Batch) -> tuple[Tensor, Tensor]:
        """`(B, n)` KL(teacher || student) at each written token, and the teacher's choice there."""
        made = self.batch(draft, batch)
        with evaluating(models.module):
            own: Law = models.student(made).law.detach()
        other = models.teacher(made).law
        rows = vocabulary.divergence(own, other, "forward", reduction="none")
        distance = torch.zeros_like(draft.ids, dtype=rows.dtype)
        distance[draft.kept] = rows
        choice = draft.ids.clone()
        choice[draft.kept] = vocabulary.facts(other)["argmax"]
        return distance, choice

    def _corrected(
        self, model: nn.Module, draft: Draft, found: Tensor, place: Tensor, token: Tensor, room: int, options: dict[str, Any]
    ) -> Draft:
        """The draft with the rows that have an error token written anew."""
        part = Draft(draft.prompts[found], draft.mask[found], draft.ids[found], draft.kept[found])
        new = rewrite(model, part, place[found], token[found], tokens=room, **options)
        length = max(draft.ids.shape[1], new.ids.shape[1])
        ids = draft.ids.new_full((len(draft.ids), length), self.text.pad)
        kept = torch.zeros_like(ids, dtype=torch.bool)
        ids[:, : draft.ids.shape[1]], kept[:, : draft.ids.shape[1]] = draft.ids, draft.kept
        ids[found], kept[found] = self.text.pad, False
        rows = found.nonzero().squeeze(1)
        ids[rows, : new.ids.shape[1]] = new.ids
        kept[rows, : new.ids.shape[1]] = new.kept
        return Draft(draft.prompts, draft.mask, ids, kept)
