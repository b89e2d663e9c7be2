"""How far a classifier's confidence can be trusted.

Everywhere: `probabilities` is `(N, C)`, or `(N,)` for the positive class of two; `labels` is `(N,)` int64, and samples labelled -1 are
left out. The confidence of a sample is its largest probability. Every score is a Python float: these run once per evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.data.batch import UNLABELLED
from limbeck.errors import UserError
from limbeck.losses._rows import wide


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: for each confidence bin `(edges[i], edges[i + 1]]` its mean confidence, accuracy and size (0 where empty)."""

    edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def error(self) -> float:
        """sum_bins count / N * |accuracy - confidence|."""
        gap = (self.accuracy - self.confidence).abs() * self.count
        return float(gap.sum() / self.count.sum())


def _labelled(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = wide(probabilities)
    if probabilities.ndim == 1:
        probabilities = torch.stack([1 - probabilities, probabilities], 1)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise UserError(
            f"the probabilities have shape {tuple(probabilities.shape)}, the labels {tuple(labels.shape)}", "use (N, C) and (N,)"
        )
    known = labels != UNLABELLED
    probabilities, labels = probabilities[known], labels[known].long()
    if not len(labels):
        raise UserError("there is no labelled sample to measure on", "give an evaluation split with labels")
    return probabilities, labels


def _confidence(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    probabilities, labels = _labelled(probabilities, labels)
    confidence, guess = probabilities.double().max(1)
    return confidence, (guess == labels).double()


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """The reliability diagram over `bins` equally wide bins of confidence.

    >>> reliability(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0]), bins=2).count
    tensor([0, 2])
    """
    confidence, correct = _confidence(probabilities, labels)
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    bin_of = torch.bucketize(confidence, edges[1:-1])
    count = torch.bincount(bin_of, minlength=bins)
    filled = count.clamp(min=1)
    mean_confidence = torch.bincount(bin_of, confidence, minlength=bins) / filled
    return Reliability(edges, mean_confidence, torch.bincount(bin_of, correct, minlength=bins) / filled, count)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """sum_bins count / N * |accuracy - confidence| over equally wide bins. Guo et al. (arXiv 1706.04599).

    >>> round(expected_calibration_error(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 0])), 3)
    0.15
    """
    return reliability(probabilities, labels, bins).error


def adaptive_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The same over bins of equal size along the sorted confidences, so that crowded regions are resolved. Nguyen & O'Connor (2015).

    >>> round(adaptive_calibration_error(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]), bins=2), 3)
    0.45
    """
    confidence, correct = _confidence(probabilities, labels)
    order = confidence.argsort(stable=True)
    gaps = (correct - confidence)[order]
    return float(sum(part.sum().abs() for part in gaps.tensor_split(min(bins, len(gaps)))) / len(gaps))


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """mean -log p_label, in nats; probabilities below the dtype's smallest number count as that number.

    >>> round(negative_log_likelihood(torch.tensor([[0.5, 0.5]]), torch.tensor([0])), 4)
    0.6931
    """
    probabilities, labels = _labelled(probabilities, labels)
    chosen = probabilities.gather(1, labels.unsqueeze(1)).clamp(min=torch.finfo(probabilities.dtype).tiny)
    return float(-chosen.double().log().mean())


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """mean over samples of sum_c (p_c - y_c)^2, between 0 and 2.

    >>> brier_score(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
    0.5
    """
    probabilities, labels = _labelled(probabilities, labels)
    one_hot = torch.zeros_like(probabilities).scatter_(1, labels.unsqueeze(1), 1)
    return float((probabilities - one_hot).double().square().sum(1).mean())
