"""What each term of a loss does to the student: its value, its gradient's norm, and its share of the update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from limbeck import processes

SMALL_SHARE = 0.01
"""A term below this share of the update is worth a warning: it does next to nothing."""


def term_norms(terms: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> dict[str, float]:
    """The Euclidean norm of each term's gradient with respect to the parameters; the graph is kept for the real backward pass.

    Of several processes it is the norm of the mean gradient.
    """
    norms: dict[str, float] = {}
    for name in dict.fromkeys(name for names in processes.every(list(terms)) for name in names):
        value = terms.get(name)
        reaches = isinstance(value, Tensor) and value.requires_grad
        if not (reaches or processes.world() > 1):
            norms[name] = 0.0
            continue
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) if reaches else [None] * len(parameters)
        if processes.world() > 1:  # a term, or a weight, may be in use on another process only, so all of them travel
            gradients = processes.averaged([torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters)])
        norms[name] = float(nn.utils.get_total_norm([gradient.detach().float() for gradient in gradients if gradient is not None]))
    return norms


@contextmanager
def uncompiled() -> Iterator[None]:
    """Networks given to torch.compile run as they are written in here, so that `term_norms` may go through their graph several times.

    The backward pass of a compiled graph may write over what the forward pass saved: a second one raises, or reads what is no longer there.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


def shares(norms: Mapping[str, float]) -> dict[str, float]:
    """Each norm over the sum of all norms (all 0 when there is no gradient at all)."""
    total = sum(norms.values())
    return {name: norm / total if total > 0 else 0.0 for name, norm in norms.items()}
