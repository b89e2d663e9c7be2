"""Means with intervals and paired comparisons over seeds (Student's t). Nothing here ever returns NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced at this scale"
MECHANISM_ONLY = "mechanism only"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _sd(values: Sequence[float], mean: float) -> float:
    """The sample standard deviation; exactly 0 for equal values, which rounding must not turn into a tiny spread."""
    if len(values) < 2 or min(values) == max(values):
        return 0.0
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _half_width(sd: float, n: int, confidence: float) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)


def summary(values: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """Mean, sample standard deviation, count and the t interval of the mean.

    Returns:
        `mean`, `sd` (None for one value), `n`, `interval` ([low, high], None for one value).
    """
    values = [float(v) for v in values]
    if not values:
        return {"mean": None, "sd": None, "n": 0, "interval": None}
    mean, n = _mean(values), len(values)
    if n == 1:
        return {"mean": mean, "sd": None, "n": 1, "interval": None}
    sd = _sd(values, mean)
    half = _half_width(sd, n, confidence)
    return {"mean": mean, "sd": sd, "n": n, "interval": [mean - half, mean + half]}


def paired(method_values: Sequence[float], baseline_values: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """The paired difference method - baseline, value by value (the same seeds in the same order).

    Returns:
        `difference` (mean), `interval` ([low, high] of the mean difference, None for one pair), `p` (two-sided paired t test; None for
        one pair; 1 when all differences are 0, 0 when they are equal and not 0), `wins` (pairs where the method's value is the higher
        one), `losses` (the lower one), `n`.
    """
    if len(method_values) != len(baseline_values):
        raise ValueError(f"paired() needs the same seeds on both sides, got {len(method_values)} and {len(baseline_values)} values")
    differences = [float(a) - float(b) for a, b in zip(method_values, baseline_values)]
    found = summary(differences, confidence)
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    p: float | None = None
    if found["n"] > 1:
        if found["sd"] == 0:
            p = 1.0 if found["mean"] == 0 else 0.0
        else:
            from scipy.stats import ttest_1samp

            p = float(ttest_1samp(differences, 0.0).pvalue)
    return {"difference": found["mean"], "interval": found["interval"], "p": p, "wins": wins, "losses": losses, "n": found["n"]}


def verdict(difference: float | None, interval: Sequence[float] | None, higher_is_better: bool = True) -> str:
    """The status "reproduced" when the interval leaves out 0 on the method's side, else "not reproduced at this scale".

    Without an interval (a single seed) nothing is reproduced.
    """
    if difference is None or interval is None:
        return NOT_REPRODUCED
    low, high = interval
    return REPRODUCED if (low > 0 if higher_is_better else high < 0) else NOT_REPRODUCED


def higher_is_better(metric: str) -> bool:
    """Whether a larger figure is the better one; losses, errors, distances and prices are better small.

    What follows an "@" (the steps or the rank the figure was taken at) is not part of the name.
    """
    metric = metric.lower().split("@")[0]
    if metric in {"feature_distance", "kernel_distance", "sliced_distance", "copies", "saturation"}:  # of generated samples
        return False
    if metric in {"self_intersections", "jaggedness"}:  # of drawings
        return False
    small = {"loss", "ece", "nll", "brier", "error", "perplexity", "kl", "js", "latency", "seconds", "flops", "params", "bytes", "memory"}
    small |= {"mae", "mse", "rmse", "wer", "cer", "fid", "bits"}
    return not any(part in small for part in metric.replace(".", "_").replace("-", "_").split("_"))
