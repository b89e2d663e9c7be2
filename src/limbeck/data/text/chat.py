"""Conversations as pairs: everything before the last answer is the prompt, earlier answers in it are scored too."""

from __future__ import annotations

from typing import Any

import numpy as np

from limbeck.data.text.ragged import encoded
from limbeck.data.text.rows import Row
from limbeck.errors import UserError


def check_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot write conversations.

    Raises:
        UserError: it has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "chat is set, but the tokenizer has no chat template", "take the tokenizer of a chat model, or set tokenizer.chat_template"
        )


def _write(tokenizer: Any, messages: list[dict[str, Any]], row: Row, answer: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # a template is a program; it raises what it likes, mostly about roles
        raise UserError(f"the chat template cannot write {row.place}: {error}", "check the roles and their order") from None


def _checked(row: Row) -> list[dict[str, Any]]:
    messages = row.messages
    shaped = isinstance(messages, (list, tuple)) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not shaped or not messages:
        raise UserError(f"the messages of {row.place} are no conversation", 'write [{"role": "user", "content": ...}, ...]')
    return list(messages)


def spans(tokenizer: Any, row: Row) -> tuple[str, list[tuple[int, int]]]:
    """(the conversation as a text, the characters from and to which each answer reaches).

    An answer begins where the template's prompt for it ends, and includes what the template closes it with.

    Raises:
        UserError: there is no answer, or the template writes earlier turns differently once later ones are there.
    """
    messages = _checked(row)
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise UserError(f"{row.place} has no message of the assistant", "each conversation needs an answer to learn from")
    messages = messages[: last + 1]
    whole = _write(tokenizer, messages, row)
    found = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = _write(tokenizer, messages[:i], row, answer=True), _write(tokenizer, messages[: i + 1], row)
        if not after.startswith(before) or not whole.startswith(after):
            raise UserError(
                f"the chat template rewrites earlier turns of {row.place} when later ones follow",
                "give one answer a conversation, or a template that only appends",
            )
        found.append((len(before), len(after)))
    return whole, found


def encode_chat(tokenizer: Any, rows: list[Row], drop_empty: bool = False) -> dict[str, list[np.ndarray]]:
    """Columns `prompt`, `completion`, `scored`, `prompt_text`, `completion_text` of conversations; the end is the last answer.

    Raises:
        UserError: no template, no conversation, an empty answer (unless `drop_empty`).
    """
    check_template(tokenizer)
    made: dict[str, list[np.ndarray]] = {n: [] for n in ("prompt", "completion", "scored", "prompt_text", "completion_text")}
    for row in rows:
        answers = [m["content"] for m in _checked(row) if m["role"] == "assistant"]
        if answers and not answers[-1].strip():
            if drop_empty:
                continue
            raise UserError(f"the last answer of {row.place} is empty", "fill it, or leave such rows out with drop_empty: true")
        whole, found = spans(tokenizer, row)
        coded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, begins = np.asarray(coded["input_ids"], np.int64), np.asarray(coded["offset_mapping"], np.int64).reshape(-1, 2)[:, 0]
        scored = np.zeros(len(ids), np.uint8)
        for start, end in found:
            scored[(begins >= start) & (begins < end)] = 1
        first = int((begins < found[-1][0]).sum())
        made["prompt"].append(ids[:first])
        made["completion"].append(ids[first:])
        made["scored"].append(scored[:first])
        made["prompt_text"].append(encoded(whole[: found[-1][0]]))
        made["completion_text"].append(encoded(answers[-1]))
    return made


def closing(tokenizer: Any) -> list[int]:
    """Ids with which the template closes an answer."""
    whole = spans(tokenizer, Row(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcb"}], place="a probe"))[0]
    tail = whole[whole.rindex("bcb") + 3 :]
    return list(tokenizer(tail, add_special_tokens=False)["input_ids"]) if tail else []
