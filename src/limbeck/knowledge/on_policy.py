"""Text that the student writes itself, as batches to learn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.data.batch import IGNORE, Batch
from limbeck.errors import UserError


@dataclass(frozen=True)
class Writer:
    """How a student writes while it learns.

    Attributes:
        tokens: the most that it writes for a prompt.
        prompt: of windows of plain text (which have no prompts of their own), so many tokens are the prompt.
        temperature, top_p: of its choice of tokens; 0 is the likeliest token.
    """

    tokens: int = 64
    prompt: int = 16
    temperature: float = 1.0
    top_p: float | None = None


def prompts_of(split: Any, batch: Batch, length: int) -> tuple[Tensor, Tensor]:
    """`(B, P)` prompts and their mask, padded on the left: the data's own, or the first `length` tokens of each window.

    Raises:
        UserError: windows that are not longer than their prompts.
    """
    if hasattr(split, "prompts"):
        assert batch.index is not None
        ids, mask = split.prompts(batch.index)
        device = batch.inputs["input_ids"].device
        return ids.to(device), mask.to(device)
    ids = batch.inputs["input_ids"]
    if ids.shape[1] <= length:
        raise UserError(f"prompts of {length} tokens from windows of {ids.shape[1]}", "set the method's prompt to less than text.length")
    ids = ids[:, :length]
    return ids, torch.ones_like(ids)


def written_batch(prompts: Tensor, mask: Tensor, ids: Tensor, kept: Tensor, batch: Batch, pad: int) -> Batch:
    """A batch of prompts and what was written after them, scored on what was written.

    Args:
        prompts, mask: `(B, P)` padded on the left.
        ids, kept: `(B, n)` written tokens; `kept` is false behind the end of a text.
        batch: whose index goes on; everything else is new.
        pad: the padding token.
    """
    tokens = torch.cat([prompts, ids], 1)
    seen = torch.cat([mask.bool(), kept], 1)
    scored = torch.cat([torch.zeros_like(mask, dtype=torch.bool), kept], 1)
    # models learn from rows that are padded on the right: every row is turned so that its own tokens come first
    order = torch.sort((~seen).to(torch.int8), dim=1, stable=True).indices
    tokens, seen, scored = (value.gather(1, order) for value in (tokens, seen, scored))
    width = int(seen.sum(1).max())
    tokens, seen, scored = tokens[:, :width], seen[:, :width], scored[:, :width]
    inputs = {"input_ids": torch.where(seen, tokens, torch.full_like(tokens, pad)), "attention_mask": seen.to(torch.int64)}
    return Batch(inputs, torch.where(scored, tokens, torch.full_like(tokens, IGNORE)), batch.index, dict(batch.extra))


def room_to_write(tokens: int, prompts: Tensor, length: int) -> int:
    """How many tokens fit behind prompts `(B, P)` into samples of `length`, at most `tokens`.

    Raises:
        UserError: no room to write.
    """
    room = min(tokens, length - prompts.shape[1])
    if room < 1:
        raise UserError(f"prompts of {prompts.shape[1]} tokens leave no room to write in samples of {length}", "raise text.length")
    return room


def own_text(model: nn.Module, split: Any, batch: Batch, writer: Writer, text: Any, kind: str) -> Batch:
    """The batch's prompts with what the model writes after them (no gradient goes through the writing).

    Tokens are drawn from torch's global generator, which checkpoints restore. No text gets longer than the samples of the data.

    Args:
        model: the student (or a teacher that writes).
        split: of the data that the batch came from.
        batch: of it.
        writer: how it writes.
        text: the data's `Text`.
        kind: "causal-lm" or "seq2seq".
    """
    from limbeck.decoding import generate

    if text.pad is None:
        raise UserError("the tokenizer has no padding token, and written texts differ in length", "set text.pad=eos")
    prompts, mask = prompts_of(split, batch, writer.prompt)
    room = writer.tokens if kind == "seq2seq" else room_to_write(writer.tokens, prompts, text.length)
    made = generate(
        model,
        prompts,
        mask,
        new_tokens=room,
        temperature=writer.temperature,
        top_p=writer.top_p,
        eos=text.eos,
        pad=text.pad,
        vocabulary=text.vocabulary,
    )
    if kind == "seq2seq":
        labels = torch.where(made.mask, made.ids, torch.full_like(made.ids, IGNORE))
        return Batch({"input_ids": prompts, "attention_mask": mask.to(torch.int64)}, labels, batch.index, dict(batch.extra))
    return written_batch(prompts, mask, made.ids, made.mask, batch, text.pad)
