"""How much of the wording of reference texts predictions have: exact match, longest common subsequence; and how varied texts are."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

from limbeck.errors import UserError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces (SQuAD, Rajpurkar et al., arXiv 1606.05250).

    >>> normalised("The  cat, a dog!")
    'cat dog'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _pairs(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[tuple[str, list[str]]]:
    """Each prediction with its references, once the numbers agree."""
    if isinstance(predictions, str) or isinstance(references, str):
        raise UserError("a single text where a list of texts is needed", "put it into a list: [text]")
    if len(predictions) != len(references):
        raise UserError(f"{len(predictions)} predictions, {len(references)} references", "give one reference, or one list of them, a text")
    if not predictions:
        raise UserError("there are no predictions", "give at least one text")
    listed = [[reference] if isinstance(reference, str) else list(reference) for reference in references]
    bare = [i for i, reference in enumerate(listed) if not reference]
    if bare:
        raise UserError(f"prediction {bare[0]} has no reference", "give at least one reference a text")
    return list(zip(predictions, listed))


def exact_match(predictions: Sequence[str], references: Sequence[str | Sequence[str]], normalise: bool = True) -> float:
    """Share of predictions that equal a reference of theirs.

    Args:
        predictions: N texts. references: N texts, or N lists of texts any of which counts.
        normalise: compare what `normalised` leaves; else only the outer white space is cut.

    Returns:
        in [0, 1], larger is better.

    >>> exact_match(["The Seine.", "no"], ["seine", ["yes", "maybe"]])
    0.5
    """
    form = normalised if normalise else str.strip
    pairs = _pairs(predictions, references)
    return sum(form(text) in {form(reference) for reference in listed} for text, listed in pairs) / len(pairs)


def rouge_l(predictions: Sequence[str], references: Sequence[str | Sequence[str]], stemmer: bool = False) -> dict[str, float]:
    """ROUGE-L of the package rouge-score: longest common subsequence of words (Lin 2004), mean over texts.

    F = 2 P R / (P + R) with P = LCS / words of the prediction and R = LCS / words of the reference. Of several references the one with the
    best F counts. The package lowers case and splits at everything but a-z and 0-9: texts of other scripts have no words for it.

    Args:
        predictions: N texts. references: N texts or N lists of texts.
        stemmer: Porter's stemmer before comparing, as papers on summaries often do.

    Returns:
        `precision`, `recall`, `f`, each in [0, 1].

    Raises:
        UserError: rouge-score is not installed, or numbers of texts differ.
    """
    pairs = _pairs(predictions, references)
    scorer = _scorer(stemmer)
    best = []
    for text, listed in pairs:
        scores = [scorer.score(reference, text)["rougeL"] for reference in listed]
        best.append(max(scores, key=lambda score: score.fmeasure))
    names = {"precision": "precision", "recall": "recall", "f": "fmeasure"}
    return {name: sum(float(getattr(score, theirs)) for score in best) / len(best) for name, theirs in names.items()}


def _scorer(stemmer: bool) -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise UserError("rouge-score is not installed", "`pip install 'limbeck[text]'`") from None
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stemmer)


def distinct_n(texts: Sequence[str] | Sequence[Sequence[Any]], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of all texts together (Li et al., arXiv 1510.03055): near 0 when texts repeat themselves.

    It falls with the amount of text: compare equal amounts only.

    Args:
        texts: strings, split at white space, or sequences of tokens.
        n: length of the n-grams.

    Returns:
        in [0, 1]; 0 when no text is as long as n.

    >>> distinct_n(["a b a b"], 2)
    0.6666666666666666
    """
    if n < 1:
        raise UserError(f"n = {n}", "n-grams have 1 token or more; 1 and 2 are usual")
    if isinstance(texts, str):
        raise UserError("a single text where a list of texts is needed", "put it into a list: [text]")
    seen, total = set(), 0
    for text in texts:
        tokens = text.split() if isinstance(text, str) else list(text)
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def edit_distance(prediction: Sequence[Any], reference: Sequence[Any]) -> int:
    """Levenshtein distance of two sequences of tokens (or of characters, of two strings): insertions, deletions, replacements.

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = list(range(len(reference) + 1))
    for i, left in enumerate(prediction, 1):
        corner, row[0] = row[0], i
        for j, right in enumerate(reference, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (left != right))
    return row[-1]
