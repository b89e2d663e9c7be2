"""How good texts and embeddings of texts are. Figures are in [0, 1] and larger is better unless a function says otherwise."""

from limbeck.evaluation.text.likelihood import bits_per_byte, perplexity
from limbeck.evaluation.text.overlap import distinct_n, edit_distance, exact_match, normalised, rouge_l
from limbeck.evaluation.text.retrieval import ranks, retrieval

__all__ = [
    "bits_per_byte",
    "distinct_n",
    "edit_distance",
    "exact_match",
    "normalised",
    "perplexity",
    "ranks",
    "retrieval",
    "rouge_l",
]
