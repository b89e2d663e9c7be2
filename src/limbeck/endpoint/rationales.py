"""Rationales from a language model by few-shot prompts, for Distilling Step-by-Step (arXiv 2305.02301, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from limbeck.errors import UserError

PHRASE = "So the answer is"
"""What stands between a rationale and its label."""


def few_shot_prompt(examples: Sequence[tuple[str, str, str]], new_input: str, phrase: str = PHRASE) -> str:
    """A prompt that shows how to give reasons and then a label, and ends where the model shall go on.

    Args:
        examples: (input, rationale, label) of a few examples, written by a person.
        new_input: what the model shall reason about.
        phrase: fixed words before the label; `parse_answer` splits at them.

    Returns:
        Blocks `Q: <input>`, `A: <rationale> <phrase> <label>.` with an empty line between, the last one ending in `A:`.

    Raises:
        UserError: no examples, an empty part, or the phrase inside an example, where it could not be told from the real one.
    """
    if not examples:
        raise UserError("a few-shot prompt needs examples", "give at least one (input, rationale, label)")
    if not phrase.strip():
        raise UserError("the phrase before the label is empty", f"give a few words, such as {PHRASE!r}")
    blocks = []
    for number, (text, rationale, label) in enumerate(examples, 1):
        if not (text.strip() and rationale.strip() and label.strip()):
            raise UserError(f"example {number} has an empty input, rationale or label", "fill it in, or leave the example away")
        if any(phrase.strip().lower() in part.lower() for part in (rationale, label)):
            raise UserError(f"example {number} has the phrase {phrase!r} in its rationale or label", "take it out; it is put in by itself")
        blocks.append(f"Q: {text.strip()}\nA: {rationale.strip()} {phrase.strip()} {label.strip()}.")
    return "\n\n".join([*blocks, f"Q: {new_input.strip()}\nA:"])


def _same(text: str) -> str:
    return " ".join(text.lower().split())


def parse_answer(text: str, phrase: str = PHRASE, allowed_labels: Iterable[str] | None = None) -> tuple[str, str] | None:
    """Rationale and label of a model's answer, or None when it is not well formed.

    Well formed is: a rationale, the phrase once, a label on the same line. What follows on later lines (a model going on with questions
    of its own) is not read. Case does not count in the phrase; colons, quotes and brackets round the label and its full stop are taken off.

    Args:
        text: of the answer.
        phrase: as in `few_shot_prompt`.
        allowed_labels: the labels there are; the one that the answer names, apart from case and spaces, is returned as written here.

    Returns:
        (rationale, label), the rationale without the phrase and the label.
    """
    # an answer ends where the model begins another example
    text = text.split("\nQ:")[0]
    lowered, mark = text.lower(), phrase.strip().lower()
    if not mark or len(lowered) != len(text) or lowered.count(mark) != 1:
        return None
    at = lowered.index(mark)
    rationale, rest = text[:at].strip(), text[at + len(mark) :].lstrip(" \t:").split("\n")[0]
    rationale = rationale[2:].strip() if rationale.startswith("A:") else rationale
    label = rest.strip().rstrip(".").strip().strip("\"'()[]*`").rstrip(".").strip()
    if not rationale or not label:
        return None
    if allowed_labels is not None:
        found = [known for known in allowed_labels if _same(known) == _same(label)]
        return (rationale, found[0]) if found else None
    return rationale, label
