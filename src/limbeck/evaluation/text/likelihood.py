"""Figures of a summed negative log-likelihood: per token, and per byte, where tokenizers can be compared."""

from __future__ import annotations

import math

from limbeck.errors import UserError


def _check(nll: float, count: int, unit: str) -> None:
    if count < 1:
        raise UserError(f"{count} scored {unit}", f"a mean needs at least one of the {unit}: look at the mask of the labels")
    if math.isnan(nll) or nll < 0:
        raise UserError(f"a summed negative log-likelihood of {nll}", "it is a sum of -log probabilities in nats: 0 or more")


def perplexity(nll: float, tokens: int) -> float:
    """exp of the mean negative log-likelihood of a token; infinity where that is beyond floats.

    Args:
        nll: sum over scored tokens, in nats. tokens: how many were scored.

    >>> perplexity(2 * math.log(10), 2)
    10.000000000000002
    """
    _check(nll, tokens, "tokens")
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def bits_per_byte(nll: float, size: int) -> float:
    """Bits a byte of UTF-8 text: nll / (size ln 2). Models with different tokenizers can be compared by it.

    Args:
        nll: sum over scored tokens, in nats. size: bytes of the text these tokens stand for.

    >>> bits_per_byte(8 * math.log(2), 4)
    2.0
    """
    _check(nll, size, "bytes")
    return nll / (size * math.log(2))
