"""How often a target accepts what a draft writes, and what speed follows from it: exact sums and closed forms, no decoding."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from limbeck.decoding.sampling import check_sampling
from limbeck.errors import UserError
from limbeck.losses.vocabulary import Law, agreement, overlap


def _law(given: Tensor | Law) -> Law:
    """Logits `(N, V)` as a law; a law as it is."""
    return Law(dense=given) if isinstance(given, Tensor) else given


def common_width(target: int, draft: int, vocabulary: int | None) -> int:
    """The number of real tokens of two output matrices, padded to different widths.

    Raises:
        UserError: widths differ and nobody says how many tokens there are, or fewer columns than tokens.
    """
    if vocabulary is None:
        if target != draft:
            raise UserError(
                f"the target has {target} logits, the draft {draft}",
                "if both share one tokenizer, give vocabulary=len(tokenizer); else take a draft of the target's tokenizer",
            )
        return target
    if not 0 < vocabulary <= min(target, draft):
        raise UserError(
            f"vocabulary {vocabulary}, while the target has {target} logits and the draft {draft}",
            "give the number of tokens of the tokenizer",
        )
    return vocabulary


def acceptance(
    target: Tensor | Law, draft: Tensor | Law, *, temperature: float = 1.0, vocabulary: int | None = None, chunk: int | None = None
) -> Tensor:
    """Chance that a token drawn from the draft is accepted: sum_v min(p(v), q(v)) = 1 - total variation.

    Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), theorem 3.5; DistillSpec
    (arXiv 2310.08461). The acceptance of decoding is its mean over places of texts that the *target* wrote: theirs is the law of what is
    emitted.

    Args:
        target, draft: logits `(N, V)` of p and q, or Laws of N places. Built and summed some rows at a time.
        temperature: divides both logits; 0 gives greedy agreement (1 where both have the same likeliest token).
        vocabulary: number of real tokens when the output matrices are padded.
        chunk: places at a time; `limbeck.losses.vocabulary.chunk_rows` unless given.

    Returns:
        `(N,)` float32 in [0, 1].

    Raises:
        UserError: different numbers of places, or widths that do not fit.
    """
    check_sampling(temperature)
    if len(target) != len(draft):
        raise UserError(f"{len(target)} places of the target, {len(draft)} of the draft", "read the same texts with both")
    p, q = _law(target), _law(draft)
    width = common_width(p.width, q.width, vocabulary)
    p, q = replace(p, vocabulary=width), replace(q, vocabulary=width)
    found = agreement(p, q, chunk=chunk) if temperature == 0 else overlap(p, q, temperature=temperature, chunk=chunk)
    return found.float().clamp(max=1.0)


def greedy_agreement(target: Tensor | Law, draft: Tensor | Law, *, vocabulary: int | None = None) -> Tensor:
    """`(N,)`: 1 where target and draft have the same likeliest token, else 0. Arguments as in `acceptance`."""
    return acceptance(target, draft, temperature=0.0, vocabulary=vocabulary)


def _check(alpha: float, gamma: int) -> None:
    if not 0 <= alpha <= 1:
        raise UserError(f"acceptance {alpha}", "it is a probability, between 0 and 1")
    check_gamma(gamma)


def check_gamma(gamma: int) -> None:
    """Refuse a block of no drafted token."""
    if not isinstance(gamma, int) or gamma < 1:
        raise UserError(f"gamma = {gamma} drafted tokens a block", "draft 1 or more; 3 to 7 is usual")


def block_efficiency(alpha: float, gamma: int) -> float:
    """Tokens a pass of the target emits: tau = (1 - alpha^(gamma+1)) / (1 - alpha), between 1 and gamma + 1.

    It takes acceptance as independent from token to token (arXiv 2211.17192, equation 1).

    >>> block_efficiency(0.5, 3)
    1.875
    """
    _check(alpha, gamma)
    return float(sum(alpha**i for i in range(gamma + 1)))


def speedup(alpha: float, gamma: int, c: float) -> float:
    """Times faster than plain decoding: tau / (c gamma + 1) (arXiv 2211.17192, theorem 3.8).

    Args:
        alpha: acceptance. gamma: drafted tokens a block.
        c: seconds of one step of the draft over those of one step of the target, both with caches on the same machine.

    >>> speedup(0.5, 3, 0.25)
    1.0714285714285714
    """
    if c < 0:
        raise UserError(f"cost ratio c = {c}", "it is a ratio of two durations, 0 or more")
    return block_efficiency(alpha, gamma) / (c * gamma + 1)
