"""Prompts that ask for reasons and labels, and reading what comes back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.endpoint import few_shot_prompt, parse_answer
from limbeck.errors import UserError

EXAMPLES = [("alcohol 14.1", "Much alcohol.", "strong"), ("alcohol 5", "Little alcohol.", "weak")]


def test_the_prompt_shows_the_examples_and_leaves_the_answer_open():
    assert few_shot_prompt(EXAMPLES, " alcohol 9 ") == (
        "Q: alcohol 14.1\nA: Much alcohol. So the answer is strong.\n\n"
        "Q: alcohol 5\nA: Little alcohol. So the answer is weak.\n\nQ: alcohol 9\nA:"
    )
    assert "Much alcohol. Hence strong." in few_shot_prompt(EXAMPLES, "x", phrase="Hence")


@pytest.mark.parametrize(
    ("examples", "phrase", "words"),
    [
        ([], "so", "needs examples"), ([("a", " ", "c")], "so", "example 1 has an empty"),
        (EXAMPLES, " ", "phrase before the label is empty"),
        ([("a", "b so c", "d")], "So", "example 1 has the phrase"),
    ],
)  # fmt: skip
def test_examples_that_cannot_be_used(examples, phrase, words):
    with pytest.raises(UserError, match=words):
        few_shot_prompt(examples, "x", phrase)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Much alcohol. So the answer is strong.", ("Much alcohol.", "strong")),
        ("Because.\nSo the answer is: 'weak'.\n\nQ: next\nA: No. So the answer is strong.", ("Because.", "weak")),
        ("A: Because. so the ANSWER is (b)", ("Because.", "b")),
        ("Because. So the answer is 3.5.", ("Because.", "3.5")),
        ("Because. So the answer is weak.\nI hope this helps.", ("Because.", "weak")),
        ("So the answer is weak.", None),  # no rationale
        ("Because.", None),
        ("Because. So the answer is", None),
        ("Because. So the answer is .", None),
        ("Because. So the answer is a. No, so the answer is b.", None),
        ("", None),
    ],
)
def test_only_well_formed_answers_are_read(text, expected):
    assert parse_answer(text) == expected


def test_allowed_labels_are_matched_and_returned_as_known():
    labels = ["Very  Strong", "weak"]
    assert parse_answer("Because. So the answer is very strong.", allowed_labels=labels) == ("Because.", "Very  Strong")
    assert parse_answer("Because. So the answer is medium.", allowed_labels=labels) is None
    assert parse_answer("Because. So the answer is weak, I think.", allowed_labels=labels) is None
    assert parse_answer("No. Hence: weak", "Hence", iter(labels)) == ("No.", "weak")


words = st.text(alphabet="abcdefgh 0123", min_size=1, max_size=20).map(str.strip).filter(bool)


@given(words, words)
def test_what_the_prompt_shows_is_what_is_read(rationale, label):
    shown = few_shot_prompt([("x", rationale, label)], "y").split("\nA: ")[1].removesuffix("\n\nQ: y\nA:")
    assert parse_answer(shown) == (rationale, label)


@given(st.text(max_size=200), st.text(max_size=5))
def test_any_text_gives_a_whole_answer_or_none(text, more):
    for said in (text, f"{text} So the answer is {more}"):
        found = parse_answer(said)
        assert found is None or (all(found) and "so the answer is" not in "".join(found).lower())
