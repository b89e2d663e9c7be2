"""What a draft is worth: real speculative decoding beside plain decoding of the target, on the same prompts and the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.decoding.acceptance import acceptance, block_efficiency, check_gamma
from limbeck.decoding.cached import Cached, evaluating
from limbeck.decoding.generate import generate
from limbeck.decoding.speculative import Speculated, speculative
from limbeck.errors import UserError

_ROUNDS = 21  # passes timed for each ratio


@dataclass(frozen=True)
class BlockFigures:
    """Speculative decoding with one gamma, all prompts together.

    Attributes:
        gamma: drafted tokens a block.
        block_efficiency: tau, emitted tokens over passes of the target.
        expected_block_efficiency: the closed form with the measured alpha. It takes acceptance as independent from token to token and texts
            as endless; the last block of a text is cut.
        acceptance: accepted over examined tokens; None when none was examined.
        seconds_per_token, draft_seconds, target_seconds: wall time, the prompts' reading with it.
        speedup: measured, seconds a token of plain decoding over those of speculative decoding.
        predicted_speedup: tau / (c gamma + 1), with c of the report: as if a pass of gamma + 1 tokens cost as much as one of one token.
            That holds while reading the weights is what takes time (large models on accelerators), not on a CPU.
        pass_cost: v, measured seconds of a pass of the target over gamma + 1 tokens over those of one token.
        speedup_with_pass_cost: tau / (c gamma + v).
        same_text: greedy only: share of prompts with the text of plain decoding, token by token.
        block_efficiencies: tau of each prompt, for intervals.
        speedups: measured speed-up of each prompt.
    """

    gamma: int
    block_efficiency: float
    expected_block_efficiency: float
    acceptance: float | None
    seconds_per_token: float
    draft_seconds: float
    target_seconds: float
    speedup: float
    predicted_speedup: float
    pass_cost: float
    speedup_with_pass_cost: float
    same_text: float | None
    block_efficiencies: list[float]
    speedups: list[float]


@dataclass(frozen=True)
class SpeculativeReport:
    """All arms on the same prompts.

    Attributes:
        prompts, tokens: how many prompts, and how many tokens plain decoding wrote.
        temperature: 0 is greedy.
        alpha: exact acceptance (greedy: agreement) at every place of the texts the target wrote, mean over places.
        alphas: the same for each prompt.
        cost_ratio: c, median seconds of a step of the draft over those of the target, with caches and one token a step.
        plain_seconds_per_token: plain decoding of the target, wall time.
        blocks: one entry a gamma.
    """

    prompts: int
    tokens: int
    temperature: float
    alpha: float
    alphas: list[float]
    cost_ratio: float
    plain_seconds_per_token: float
    blocks: list[BlockFigures]


def speculative_report(
    target: nn.Module,
    draft: nn.Module,
    prompts: Sequence[Tensor],
    gammas: Sequence[int] = (3, 5, 7),
    *,
    new_tokens: int,
    temperature: float = 1.0,
    eos: int | Iterable[int] | None = None,
    vocabulary: int | None = None,
    seed: int = 0,
    repeats: int = 1,
) -> SpeculativeReport:
    """Decode every prompt plainly and by speculation with each gamma, arm after arm, and compare texts, passes and wall time.

    The default gammas are those of DistillSpec (arXiv 2310.08461). Each arm of prompt i has a generator of its own (seed + i): texts do
    not depend on `repeats` or on the other gammas.

    Args:
        target, draft: causal transformers models of one tokenizer.
        prompts: texts of tokens `(P,)` of any lengths, or a matrix `(N, P)`.
        new_tokens, temperature, eos, vocabulary: as in `speculative`.
        seed: of sampling.
        repeats: times each arm is timed; the shortest counts.

    Raises:
        UserError: no prompts, no gamma or one below 1, and what `generate` and `speculative` refuse.
    """
    if not len(prompts):
        raise UserError("there are no prompts", "give at least one text of tokens")
    if not len(gammas) or repeats < 1:
        raise UserError(f"{len(gammas)} gammas, {repeats} repeats", "give at least one gamma and one repeat")
    for gamma in gammas:
        check_gamma(gamma)
    eos = eos if eos is None or isinstance(eos, int) else list(eos)
    listed = [prompt[None] if prompt.ndim == 1 else prompt for prompt in prompts]

    def arm(place: int, gamma: int) -> tuple[Tensor, float, Speculated | None]:
        """Text, seconds and counts of one prompt; gamma 0 is plain decoding."""
        ids, found = listed[place], []
        for _ in range(repeats):
            draws = torch.Generator(ids.device).manual_seed(seed + place)
            how = dict(new_tokens=new_tokens, temperature=temperature, eos=eos, generator=draws, vocabulary=vocabulary)
            start = _now(ids)
            out = speculative(target, draft, ids, gamma=gamma, **how) if gamma else generate(target, ids, **how)
            found.append((out.ids, _now(ids) - start, out if gamma else None))
        return min(found, key=lambda one: one[1])

    for gamma in (0, *gammas):
        arm(0, gamma)  # the first pass of a model is slow
    arms = {gamma: [] for gamma in (0, *gammas)}
    for place in range(len(listed)):
        for gamma, results in arms.items():
            results.append(arm(place, gamma))
    plain = arms[0]
    with evaluating(target, draft):
        alphas = [_alpha(target, draft, ids, text, temperature, vocabulary) for ids, (text, _, _) in zip(listed, plain)]
        sizes = {gamma: min(gamma, new_tokens - 1) + 1 for gamma in gammas}
        costs = _costs(target, draft, listed[0], plain[0][0], {1, *sizes.values()})
    step = costs["target", 1]
    ratio = costs["draft", 1] / step
    every = torch.cat(alphas)
    alpha = float(every.mean())
    blocks = [_figures(gamma, arms[gamma], plain, alpha, ratio, costs["target", sizes[gamma]] / step, temperature == 0) for gamma in gammas]
    means = [float(one.mean()) for one in alphas]
    return SpeculativeReport(len(listed), len(every), temperature, alpha, means, ratio, _per_token(plain), blocks)


def _now(ids: Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter()


def _per_token(results: list[tuple[Tensor, float, Speculated | None]]) -> float:
    return sum(seconds for _, seconds, _ in results) / sum(text.shape[1] for text, _, _ in results)


def _alpha(target: nn.Module, draft: nn.Module, ids: Tensor, text: Tensor, temperature: float, vocabulary: int | None) -> Tensor:
    """Acceptance at each place of a text that the target wrote."""
    whole = torch.cat([ids, text], 1)[:, :-1]
    p, q = (Cached(model, vocabulary=vocabulary).feed(whole, keep=text.shape[1])[0] for model in (target, draft))
    return acceptance(p, q, temperature=temperature)


def _costs(target: nn.Module, draft: nn.Module, ids: Tensor, text: Tensor, sizes: set[int]) -> dict[tuple[str, int], float]:
    """Median seconds of a pass behind the prompt: over one token with the draft, over each number of tokens with the target, in turns."""
    readers = {"draft": Cached(draft, croppable=True), "target": Cached(target, croppable=True)}
    for reader in readers.values():
        reader.feed(ids)
    taken: dict[tuple[str, int], list[float]] = {("draft", 1): [], **{("target", size): [] for size in sorted(sizes)}}
    for _ in range(_ROUNDS):
        for (role, size), seconds in taken.items():
            tokens = text.repeat(1, size)[:, :size]
            start = _now(ids)
            readers[role].feed(tokens, keep=size)
            seconds.append(_now(ids) - start)
            readers[role].crop(size)
    return {key: statistics.median(seconds) for key, seconds in taken.items()}


def _figures(
    gamma: int,
    results: list[tuple[Tensor, float, Speculated | None]],
    plain: list[tuple[Tensor, float, Speculated | None]],
    alpha: float,
    ratio: float,
    pass_cost: float,
    greedy: bool,
) -> BlockFigures:
    runs = [run for _, _, run in results if run is not None]
    emitted = sum(run.ids.shape[1] for run in runs)
    tau = emitted / sum(run.target_passes for run in runs)
    examined = sum(run.examined for run in runs)
    return BlockFigures(
        gamma=gamma,
        block_efficiency=tau,
        expected_block_efficiency=block_efficiency(alpha, gamma),
        acceptance=sum(run.accepted for run in runs) / examined if examined else None,
        seconds_per_token=_per_token(results),
        draft_seconds=sum(run.draft_seconds for run in runs),
        target_seconds=sum(run.target_seconds for run in runs),
        speedup=_per_token(plain) / _per_token(results),
        predicted_speedup=tau / (ratio * gamma + 1),
        pass_cost=pass_cost,
        speedup_with_pass_cost=tau / (ratio * gamma + pass_cost),
        same_text=sum(torch.equal(a[0], b[0]) for a, b in zip(results, plain)) / len(plain) if greedy else None,
        block_efficiencies=[run.block_efficiency for run in runs],
        speedups=[_per_token([a]) / _per_token([b]) for a, b in zip(plain, results)],
    )
