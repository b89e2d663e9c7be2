"""Losses over a vocabulary that never hold all logits.

`Law` is N next-token distributions as hidden rows and an output matrix; `Sparse` a teacher's stored top-k. The losses run over chunks of
rows: a chunk's logits are made, scored, turned into gradients and dropped, so that memory is that of a chunk and of the gradients.
The rules of `limbeck.losses` hold, but for one: the teacher never gets a gradient here.
"""

from limbeck.losses.vocabulary.chunks import chunk_rows
from limbeck.losses.vocabulary.divergence import KINDS, cross_entropy, divergence
from limbeck.losses.vocabulary.law import Law, Sparse
from limbeck.losses.vocabulary.measures import agreement, facts, overlap
from limbeck.losses.vocabulary.rowwise import rowwise
from limbeck.losses.vocabulary.sparse import top_k

__all__ = [
    "KINDS",
    "Law",
    "Sparse",
    "agreement",
    "chunk_rows",
    "cross_entropy",
    "divergence",
    "facts",
    "overlap",
    "rowwise",
    "top_k",
]
