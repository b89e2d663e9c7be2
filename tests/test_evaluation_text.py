"""Text measures against formulas written out here, retrieval against a loop, and what is refused."""

import doctest
import importlib
import math
import sys

import pytest
import torch

from limbeck.errors import UserError
from limbeck.evaluation.text import (
    bits_per_byte,
    distinct_n,
    edit_distance,
    exact_match,
    normalised,
    perplexity,
    ranks,
    retrieval,
    rouge_l,
)


@pytest.mark.parametrize("name", ["overlap", "likelihood", "retrieval"])
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"limbeck.evaluation.text.{name}")).failed == 0


def test_exact_match():
    assert exact_match(["A cat.", "dogs", "x"], ["the CAT", "dog", ["y", "X!"]]) == pytest.approx(2 / 3)
    assert exact_match(["A cat.", " dog "], ["a cat.", "dog"], normalise=False) == 0.5
    assert normalised("The theatre, an answer; banana a") == "theatre answer banana"


def lcs(a, b):
    if not a or not b:
        return 0
    return 1 + lcs(a[1:], b[1:]) if a[0] == b[0] else max(lcs(a[1:], b), lcs(a, b[1:]))


def test_rouge_l_is_the_longest_common_subsequence():
    pytest.importorskip("rouge_score")
    texts = ["the cat sat on the mat", "one two", "nothing shared"]
    references = ["a cat was on a red mat", "two one two three", ["other words", "shared things"]]
    expected = []
    for text, reference in zip(texts, ["a cat was on a red mat", "two one two three", "shared things"]):
        a, b = text.split(), reference.split()
        p, r = lcs(a, b) / len(a), lcs(a, b) / len(b)
        expected.append((p, r, 2 * p * r / (p + r)))
    found = rouge_l(texts, references)
    for name, column in zip(("precision", "recall", "f"), zip(*expected)):
        assert found[name] == pytest.approx(sum(column) / 3)
    assert rouge_l(["running cats"], ["run cat"])["f"] == 0 and rouge_l(["running cats"], ["run cat"], stemmer=True)["f"] == 1
    assert rouge_l([""], ["word"])["f"] == 0


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(UserError) as error:
        rouge_l(["a"], ["a"])
    assert "rouge-score is not installed" in error.value.message and "limbeck[text]" in error.value.hint


def test_distinct_n():
    texts = ["a b c a b", "a b"]
    assert distinct_n(texts, 1) == pytest.approx(3 / 7)
    assert distinct_n(texts, 2) == pytest.approx(3 / 5)
    assert distinct_n([[1, 2, 1, 2], [2, 1]], 2) == pytest.approx(2 / 4)  # no n-gram reaches from one text into the next
    assert distinct_n(["a"], 2) == 0.0 and distinct_n([], 1) == 0.0


def distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


def test_edit_distance():
    draws = torch.Generator().manual_seed(0)
    for _ in range(30):
        a, b = (torch.randint(0, 3, (int(torch.randint(0, 6, (), generator=draws)),), generator=draws).tolist() for _ in range(2))
        assert edit_distance(a, b) == distance(a, b) == edit_distance(b, a)


def test_likelihoods():
    assert perplexity(30 * math.log(7), 30) == pytest.approx(7)
    assert bits_per_byte(100 * math.log(2), 50) == pytest.approx(2)
    assert perplexity(0.0, 3) == 1.0 and perplexity(1e6, 1) == math.inf
    for bad in (lambda: perplexity(1.0, 0), lambda: perplexity(math.nan, 3), lambda: perplexity(-1.0, 3), lambda: bits_per_byte(1.0, 0)):
        with pytest.raises(UserError):
            bad()


def embeddings(count=40, width=6, noise=1.5, seed=0):
    draws = torch.Generator().manual_seed(seed)
    documents = torch.randn(count, width, generator=draws)
    return documents + noise * torch.randn(count, width, generator=draws), documents


def rank_by_hand(query, documents, own):
    near = [float(torch.dot(query.double(), d.double()) / (query.double().norm() * d.double().norm())) for d in documents]
    return 1 + sum(value >= near[own] for j, value in enumerate(near) if j != own)


def test_ranks_and_measures_are_those_of_a_loop(monkeypatch):
    queries, documents = embeddings()
    expected = [rank_by_hand(query, documents, i) for i, query in enumerate(queries)]
    assert ranks(queries, documents).tolist() == expected and len(set(expected)) > 8
    assert ranks(queries * 100, documents * torch.rand(40, 1).add(0.1)).tolist() == expected  # cosine: lengths do not count
    monkeypatch.setattr(importlib.import_module("limbeck.evaluation.text.retrieval"), "_BLOCK", 130)  # three rows at a time
    assert ranks(queries, documents).tolist() == expected
    figures = retrieval(queries, documents)
    for k in (1, 5, 10):
        assert figures[f"recall@{k}"] == pytest.approx(sum(rank <= k for rank in expected) / 40)
    assert figures["mrr"] == pytest.approx(sum(1 / rank for rank in expected) / 40)
    assert figures["ndcg@10"] == pytest.approx(sum(1 / math.log2(1 + rank) for rank in expected if rank <= 10) / 40)
    assert figures["candidates"] == 40
    perfect = retrieval(documents, documents)
    assert perfect == {"recall@1": 1, "recall@5": 1, "recall@10": 1, "mrr": 1, "ndcg@10": 1, "candidates": 40}
    assert set(retrieval(queries, documents, at=(3,))) == {"recall@3", "mrr", "ndcg@10", "candidates"}


def test_pools_are_dealt_by_the_seed():
    queries, documents = embeddings(count=47)
    found = ranks(queries, documents, pool=10, seed=3)
    order = torch.randperm(47, generator=torch.Generator().manual_seed(3))
    expected = [
        rank_by_hand(queries[i], documents[part], place)
        for part in (order[start : start + 10] for start in (0, 10, 20, 30))
        for place, i in enumerate(part.tolist())
    ]
    assert found.tolist() == expected and len(found) == 40
    assert torch.equal(found, ranks(queries, documents, pool=10, seed=3))
    assert not torch.equal(found, ranks(queries, documents, pool=10, seed=4))
    assert retrieval(queries, documents, pool=10)["candidates"] == 10
    assert ranks(queries, documents, pool=10).double().mean() < ranks(queries, documents).double().mean()


@pytest.mark.parametrize("width", [3, 17, 384])
@pytest.mark.parametrize("kind", ["constant", "zero", "rounded"])
def test_a_collapsed_encoder_scores_nothing(width, kind):
    torch.manual_seed(0)
    row = torch.randn(width) if kind != "zero" else torch.zeros(width)
    queries, documents = row.expand(30, -1), row.expand(30, -1)
    if kind == "rounded":  # the same vector up to the last bit of its numbers
        queries, documents = (row * (1 + 1e-7 * torch.randn(30, width)) for _ in range(2))
    assert (ranks(queries, documents) == 30).all()
    figures = retrieval(queries, documents)
    assert figures["recall@10"] == 0 and figures["mrr"] == pytest.approx(1 / 30) and figures["ndcg@10"] == 0


def test_half_collapsed_documents_stand_before_the_right_one():
    documents = torch.eye(6)
    documents[3] = documents[2]
    assert ranks(torch.eye(6)[[0, 1, 2, 2, 4, 5]], documents).tolist() == [1, 1, 2, 2, 1, 1]


def bad_cases():
    queries, documents = embeddings(10)
    broken = queries.clone()
    broken[2, 1] = math.nan
    yield lambda: ranks(queries, documents[:9]), "(10, 6)"
    yield lambda: ranks(queries, documents[:, :5]), "(10, 5)"
    yield lambda: ranks(queries[0], documents), "(6,)"
    yield lambda: ranks(broken, documents), "1 values of the query embeddings"
    yield lambda: ranks(queries, documents, pool=11), "pools of 11"
    yield lambda: ranks(queries, documents, pool=1), "pools of 1"
    yield lambda: ranks(queries[:0], documents[:0]), "0 pairs"
    yield lambda: retrieval(queries, documents, at=(1, 0)), "recall at 0"
    yield lambda: exact_match(["a"], ["a", "b"]), "1 predictions, 2 references"
    yield lambda: exact_match([], []), "no predictions"
    yield lambda: exact_match("a", ["a"]), "a single text"
    yield lambda: exact_match(["a"], [[]]), "prediction 0 has no reference"
    yield lambda: rouge_l([], []), "no predictions"
    yield lambda: distinct_n(["a"], 0), "n = 0"
    yield lambda: distinct_n("a b"), "a single text"


@pytest.mark.parametrize(("call", "says"), list(bad_cases()))
def test_what_cannot_be_measured_is_refused_in_plain_words(call, says):
    with pytest.raises(UserError) as error:
        call()
    assert says in error.value.message and error.value.hint
