"""Words in front of prompts that tell a student which task it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from limbeck.data import Data
from limbeck.data.split import Split
from limbeck.data.text import PairSplit, Ragged
from limbeck.data.text.encode import first_token, token_ids
from limbeck.errors import UserError


def prefixed(split: PairSplit, prefix: str) -> PairSplit:
    """The same pairs, each prompt with a text in front of it.

    A causal student's prompts are cut at their left side; so that the prefix stays, `prompt_length` is where room is for both.

    Raises:
        UserError: conversations, whose prompts are made by a chat template.
    """
    if "scored" in split.columns:
        raise UserError("prompts of conversations get no prefix", "give prompts and completions (text.chat=false)")
    rows = torch.arange(len(split))
    texts = [prefix + prompt for prompt in split.prompt_texts(rows)]
    coder = split.text.tokenizer
    if split.seq2seq:
        prompts = token_ids(coder, texts, special=True)
    else:
        begin, front = first_token(coder), token_ids(coder, [prefix])[0]
        room = max(0, split.prompt_length - len(begin) - len(front))
        bodies = token_ids(coder, split.prompt_texts(rows))
        prompts = [
            np.concatenate([begin, ids]) if len(begin) + len(ids) <= split.prompt_length else
            np.concatenate([begin, front, body[max(0, len(body) - room) :]])
            for ids, body in zip(token_ids(coder, texts), bodies)
        ]  # fmt: skip
    names = [name for name in split.columns if name not in ("label", "domain")]
    columns = {}
    for name in names:
        own = split.columns[name]
        columns[name] = Ragged.of([own[row] for row in split.rows.tolist()], str(own.flat.dtype))
    for name in ("label", "domain"):
        if name in split.columns:
            columns[name] = Ragged.of([[value] for value in np.asarray(split.columns[name].flat)[split.rows].tolist()])
    columns["prompt"] = Ragged.of(prompts)
    columns["prompt_text"] = Ragged.texts(texts)
    return PairSplit(columns, split.text, split.prompt_length, split.closing)


def check_prefixes(split: PairSplit, prefixes: Sequence[str]) -> None:
    """Whether a student can tell the tasks apart by their prefixes.

    Raises:
        UserError: two prefixes are the same tokens (a vocabulary of words that knows neither).
    """
    seen: dict[tuple[int, ...], str] = {}
    for prefix in prefixes:
        ids = tuple(token_ids(split.text.tokenizer, [prefix])[0].tolist())
        if ids in seen:
            raise UserError(
                f"the prefixes {seen[ids]!r} and {prefix!r} become the same tokens, so the student cannot tell the tasks apart",
                "use a tokenizer that keeps every byte (text.tokenizer=bpe:512), or prefixes of words that it knows",
            )
        seen[ids] = prefix


def with_prefix(data: Data, prefix: str) -> Data:
    """The data with a prefix in front of every prompt of its test and validation split; the training split stays.

    Raises:
        UserError: a split of plain texts.
    """

    def put(split: Split) -> PairSplit:
        if not isinstance(split, PairSplit):
            raise UserError(f"{data.name} holds plain texts, which have no prompts", "use data of prompts and completions")
        return prefixed(split, prefix)

    return replace(data, test=put(data.test), valid=None if data.valid is None else put(data.valid))
