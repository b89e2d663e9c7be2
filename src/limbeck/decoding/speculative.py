"""Speculative decoding: a small model drafts tokens, the large one checks them all in one pass, and the text keeps the large one's law.

Leviathan et al. (arXiv 2211.17192), Chen et al. (arXiv 2302.01318). p is the target's law, q the draft's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.decoding.acceptance import check_gamma, common_width
from limbeck.decoding.cached import Cached, check_context, evaluating, is_encoder_decoder, output_width
from limbeck.decoding.generate import check_prompts, end_tokens
from limbeck.decoding.sampling import check_generator, check_sampling, draw
from limbeck.errors import UserError


@dataclass(frozen=True)
class Speculated:
    """A text and what it cost.

    Attributes:
        ids: `(1, n)` the new tokens, up to and with the end of text.
        target_passes: forward passes of the target, the one that reads the prompt with them.
        drafted: tokens the draft wrote.
        examined: those of them that were looked at: all accepted ones and the rejected ones, none behind a rejection.
        accepted: those that were taken over.
        draft_seconds, target_seconds: wall time of drafting, and of checking and emitting.
    """

    ids: Tensor
    target_passes: int
    drafted: int
    examined: int
    accepted: int
    draft_seconds: float
    target_seconds: float

    @property
    def seconds(self) -> float:
        return self.draft_seconds + self.target_seconds

    @property
    def block_efficiency(self) -> float:
        """tau: emitted tokens a pass of the target."""
        return self.ids.shape[1] / self.target_passes

    @property
    def acceptance(self) -> float | None:
        """Accepted over examined tokens; None when none was examined."""
        return self.accepted / self.examined if self.examined else None


def accept(
    target: Tensor, draft: Tensor, tokens: Tensor, lenience: float = 1.0, generator: torch.Generator | None = None
) -> tuple[int, Tensor]:
    """The rule that keeps the target's law: how many drafted tokens are taken, and the token that follows them.

    Token v_i is taken while r_i <= p_i(v_i) / (lenience * q_i(v_i)) with r_i uniform in [0, 1). Behind the first one refused, n, comes a
    token from normalise(max(0, p_n - q_n)); when all are taken, one from p_{g+1} (arXiv 2211.17192, algorithm 1).

    Args:
        target: `(g + 1, V)` probabilities p. draft: `(g, V)` probabilities q, from which `tokens` `(g,)` were drawn.
        lenience: below 1 more is taken and the law is no longer the target's; the refused mass still goes where p exceeds q.

    Returns:
        number of accepted tokens (0 to g), and the next token `(1,)`.
    """
    count = len(tokens)
    p, q = (law.gather(1, tokens[:, None])[:, 0] for law in (target[:count], draft))
    refused = torch.rand(count, device=tokens.device, generator=generator) * q * lenience >= p
    taken = [*refused.tolist(), True].index(True)
    law = target[taken : taken + 1]
    if taken < count:
        rest = (law - draft[taken : taken + 1]).clamp_(min=0)
        law = torch.where(rest.sum() > 0, rest, law)  # equal laws that differ by rounding leave no rest
    return taken, draw(law, generator)


def accept_greedy(target: Tensor, tokens: Tensor) -> tuple[int, Tensor]:
    """Greedy rule: drafted tokens `(g,)` are taken while they are the target's likeliest; then comes its own, from logits `(g + 1, V)`."""
    best = target.argmax(-1)
    taken = [*(best[:-1] != tokens).tolist(), True].index(True)
    return taken, best[taken : taken + 1]


def speculative(
    target: nn.Module,
    draft: nn.Module,
    ids: Tensor,
    *,
    new_tokens: int,
    gamma: int = 4,
    temperature: float = 1.0,
    eos: int | Iterable[int] | None = None,
    generator: torch.Generator | None = None,
    lenience: float = 1.0,
    vocabulary: int | None = None,
) -> Speculated:
    """Continue one prompt with the target's law at the price of fewer passes of the target.

    Both models read through their own key-value caches, which are taken back behind a rejected token. With temperature 0 the text is the
    target's greedy text (up to ties and rounding: many positions of one pass are summed in another order than one).

    Args:
        target, draft: causal transformers models of one tokenizer.
        ids: `(1, P)` the prompt, without padding.
        new_tokens: at most so many.
        gamma: drafted tokens a block, 1 or more; 3 to 7 is usual (DistillSpec, arXiv 2310.08461).
        temperature: of both laws; 0 is greedy.
        eos: the token (or tokens) that end a text.
        generator: draws all random numbers; torch's global generator when None.
        lenience: in (0, 1]; 1 is exact, see `accept`.
        vocabulary: number of tokens of the tokenizer, when output matrices are padded; columns behind it are cut in both.

    Raises:
        UserError: gamma < 1, an empty prompt or more than one, different vocabularies, too long a text, a cache that cannot be taken back.
    """
    check_gamma(gamma)
    check_sampling(temperature)
    check_generator(generator, ids.device)
    check_prompts(ids, None, new_tokens)
    _check_pair(target, draft, ids, new_tokens, temperature, lenience, vocabulary)
    with evaluating(target, draft):
        return _Run(target, draft, ids, gamma, temperature, end_tokens(eos), generator, lenience, vocabulary).write(new_tokens)


def _check_pair(
    target: nn.Module, draft: nn.Module, ids: Tensor, new_tokens: int, temperature: float, lenience: float, vocabulary: int | None
) -> None:
    if len(ids) != 1:
        raise UserError(f"{len(ids)} prompts at once", "give one at a time, (1, P): rows would accept different numbers of tokens")
    if not 0 < lenience <= 1:
        raise UserError(f"lenience {lenience}", "give a number above 0 and up to 1; 1 keeps the target's law")
    if temperature == 0 and lenience != 1:
        raise UserError(f"lenience {lenience} with greedy decoding", "it loosens a ratio of probabilities: take a temperature above 0")
    for role, model in (("target", target), ("draft", draft)):
        if is_encoder_decoder(model):
            raise UserError(f"the {role} {type(model).__name__} is an encoder-decoder model", "speculation here takes causal models")
        check_context(model, ids.shape[1], new_tokens)
    widths = output_width(target), output_width(draft)
    if None not in widths:
        common_width(*widths, vocabulary)


class _Run:
    """One text being written. Each cache holds a beginning of `text`; what it lacks is fed before the next use."""

    def __init__(
        self,
        target: nn.Module,
        draft: nn.Module,
        ids: Tensor,
        gamma: int,
        temperature: float,
        ends: list[int],
        generator: torch.Generator | None,
        lenience: float,
        vocabulary: int | None,
    ) -> None:
        self.target, self.draft = (Cached(model, vocabulary=vocabulary, croppable=True) for model in (target, draft))
        self.text, self.prompt = ids, ids.shape[1]
        self.gamma, self.temperature, self.ends = gamma, temperature, set(ends)
        self.generator, self.lenience, self.vocabulary = generator, lenience, vocabulary
        self.passes = self.drafted = self.examined = self.accepted = 0

    def write(self, new_tokens: int) -> Speculated:
        draft_seconds = target_seconds = 0.0
        ended = False
        while not ended and self.text.shape[1] - self.prompt < new_tokens:
            start = self._now()
            size = min(self.gamma, new_tokens - (self.text.shape[1] - self.prompt) - 1)
            tokens, laws = self._propose(size)
            middle = self._now()
            ended = self._check(tokens, laws)
            draft_seconds, target_seconds = draft_seconds + middle - start, target_seconds + self._now() - middle
        new = self.text[:, self.prompt :]
        return Speculated(new, self.passes, self.drafted, self.examined, self.accepted, draft_seconds, target_seconds)

    def _now(self) -> float:
        if self.text.is_cuda:
            torch.cuda.synchronize(self.text.device)
        return time.perf_counter()

    def _law(self, logits: Tensor) -> Tensor:
        return (logits.float() / self.temperature).softmax(-1)

    def _propose(self, size: int) -> tuple[Tensor, list[Tensor]]:
        """`(size,)` drafted tokens, and the laws `(1, V)` they were drawn from (none when greedy)."""
        laws: list[Tensor] = []
        text = self.text
        for _ in range(size):
            logits = self.draft.feed(text[:, self.draft.length :])[:, -1]
            if self.temperature == 0:
                token = logits.argmax(-1)
            else:
                laws.append(self._law(logits))
                token = draw(laws[-1], self.generator)
            text = torch.cat([text, token[:, None]], 1)
        return text[0, self.text.shape[1] :], laws

    def _check(self, tokens: Tensor, laws: list[Tensor]) -> bool:
        """One pass of the target over the drafted tokens; true when the text has ended."""
        size = len(tokens)
        text = torch.cat([self.text, tokens[None]], 1)
        logits = self.target.feed(text[:, self.target.length :], keep=size + 1)[0]
        if self.temperature == 0:
            taken, follow = accept_greedy(logits, tokens)
        elif size == 0:
            taken, follow = 0, draw(self._law(logits), self.generator)
        else:
            draft = torch.cat(laws)
            taken, follow = accept(self._law(logits), draft, tokens, self.lenience, self.generator)
        new = [*tokens[:taken].tolist(), int(follow)]
        stop = next((place + 1 for place, token in enumerate(new) if token in self.ends), len(new))
        self.passes, self.drafted = self.passes + 1, self.drafted + size
        self.accepted, self.examined = self.accepted + min(taken, stop), self.examined + min(taken + (taken < size), stop)
        ended = new[stop - 1] in self.ends
        self.text = torch.cat([self.text, self.text.new_tensor([new[:stop]])], 1)
        for cached in (self.target, self.draft):  # all but the last token, which nobody has read
            cached.crop(cached.length - (self.text.shape[1] - 1))
        return ended
