"""From logits to the next token: temperature, top-k, top-p, and a draw."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import UserError


def check_sampling(temperature: float, top_k: int | None = None, top_p: float | None = None) -> None:
    """Refuse what is no way to sample."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature {temperature}", "give 0 for greedy decoding, 1 for the model's own law, or any positive number")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k = {top_k}", "give 1 or more, or leave it out to keep all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p = {top_p}", "give a share of the probability above 0 and up to 1")


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """A generator draws on its own device only."""
    if generator is not None and generator.device.type != device.type:
        raise UserError(
            f"the random generator lives on {generator.device.type}, the tokens on {device.type}",
            f"make it with torch.Generator({device.type!r})",
        )


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One index a row `(B,)` from `(B, V)` weights that need not sum to 1. Indices of weight 0 never come.

    On the CPU the law is inverted (one uniform number a row): torch.multinomial draws one number a token there, several times the cost of a
    small model's step at a vocabulary of 32 thousand. Sums run in float64, so that rare tokens keep their law.
    """
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    mass = probabilities.cumsum(-1, dtype=torch.float64)
    point = torch.rand(len(mass), 1, dtype=torch.float64, generator=generator) * mass[:, -1:]
    return torch.searchsorted(mass, point, right=True)[:, 0].clamp_(max=mass.shape[1] - 1)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next token of each row.

    Temperature first, then the k likeliest tokens, then of these the smallest set of likeliest tokens whose probabilities (over what top-k
    left) reach `top_p` (Holtzman et al., arXiv 1904.09751); at least one token stays.

    Args:
        logits: `(B, V)`.
        temperature: divides the logits; 0 takes the likeliest token, the first of equals.

    Returns:
        `(B,)` int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is None and top_p is None:
        return draw(logits.softmax(-1), generator)
    count = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    logits, ids = logits.topk(count, -1)
    probabilities = logits.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        keep = before < top_p
        keep[:, 0] = True
        probabilities = probabilities * keep
    return ids.gather(-1, draw(probabilities, generator)[:, None])[:, 0]
