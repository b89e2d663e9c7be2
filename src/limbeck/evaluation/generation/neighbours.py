"""What the nearest neighbours tell: fidelity, variety, diversity within a class, copies of training samples."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.evaluation.generation._features import check_enough, check_k, distances, matrices, nearest


def precision_recall(real: Tensor, generated: Tensor, k: int = 5) -> dict[str, float]:
    """Share of generated samples on the manifold of the real ones (fidelity), and of real ones on that of the generated (variety).

    A manifold is the union of closed balls round its samples, each as wide as the distance to its k-th neighbour (Kynkaanniemi et al.
    2019, arXiv:1904.06991, equations 1 and 2; they take as many samples on both sides). One real outlier has a wide ball.

    Args:
        real, generated: `(N, D)`, at least k + 1 samples each.
        k: which neighbour; the larger, the larger both figures.

    Returns:
        `precision` and `recall`, each between 0 and 1, larger is better.

    >>> precision_recall(torch.arange(4.0)[:, None], torch.tensor([[0.0], [0.5]]), k=1)
    {'precision': 1.0, 'recall': 0.5}
    """
    check_k(k)
    real, generated = matrices(k + 1, real=real, generated=generated).values()
    return {"precision": _share_inside(generated, real, k), "recall": _share_inside(real, generated, k)}


def density_coverage(real: Tensor, generated: Tensor, k: int = 5) -> dict[str, float]:
    """How many real neighbourhoods a generated sample lies in, divided by k, and the share of those that hold any generated sample.

    Naeem et al. 2020 (arXiv:2002.09797, section 3), with the closed balls of `precision_recall` round the real samples only. For N real
    and M generated samples of one distribution density is 1 on average, coverage 1 - (N-1)...(N-k) / ((N+M-1)...(N+M-k)) (lemma 2).

    Args:
        real: `(N, D)`, at least k + 1 samples. generated: `(M, D)`, at least 1 sample.
        k: which neighbour.

    Returns:
        `density`, at least 0 and not bounded by 1 (samples crowding where the real ones are dense exceed it), larger is better;
        `coverage`, between 0 and 1, larger is better.

    >>> density_coverage(torch.arange(4.0)[:, None], torch.tensor([[0.0], [0.5]]), k=1)
    {'density': 2.0, 'coverage': 0.5}
    """
    check_k(k)
    real, generated = matrices(1, real=real, generated=generated).values()
    check_enough("real", real, k + 1)
    widths = _radii(real, k)
    hits = sum(int((d <= widths).sum()) for d in distances(generated, real))
    return {"density": hits / (k * len(generated)), "coverage": float((nearest(real, generated) <= widths).double().mean())}


def class_diversity(features: Tensor, labels: Tensor) -> float:
    """Mean Euclidean distance of two samples of a class, averaged over the classes that have two (a common measure, of no one paper).

    Args:
        features: `(N, D)`.
        labels: `(N,)`; a negative label stands for none, and such samples are left out.

    Returns:
        at least 0 (all of a class alike), larger is more diverse: better up to the real samples' own figure, noise above it.

    >>> class_diversity(torch.tensor([[0.0], [2.0], [9.0], [13.0], [7.0]]), torch.tensor([0, 0, 1, 1, 2]))  # (2 + 4) / 2
    3.0
    """
    features = matrices(1, features=features)["features"]
    if labels.shape != features.shape[:1]:
        raise UserError(f"labels of shape {tuple(labels.shape)} for {len(features)} samples", "give one label for each sample, (N,)")
    labels, means = labels.detach().cpu(), []
    for label in labels[labels >= 0].unique():
        own = features[labels == label]
        if len(own) > 1:
            means.append(sum(float(d.sum()) for d in distances(own, own)) / (len(own) * (len(own) - 1)))
    if not means:
        raise UserError("no class has two samples, so none has a diversity", "generate at least two samples for each class")
    return sum(means) / len(means)


def memorisation(generated: Tensor, train: Tensor, held_out: Tensor) -> dict[str, float]:
    """Whether generated samples are copies of training samples, judged by how near held-out real samples come to those.

    Distances to the nearest training sample, as in Meehan et al. 2020 (arXiv:2004.05675), whose test ranks them; here a ratio of means
    and a quantile.

    Args:
        generated, train, held_out: `(N, D)`, at least 1 sample each; `held_out` real and not in `train`.

    Returns:
        `nearest`: mean distance of the generated divided by that of the held-out: near 1 as new as real samples, near 0 copies, above 1
        farther from the data than real samples are. `copies`: share of generated samples no farther from a training sample than the 1 %
        quantile of the held-out, between 0 and 1: near 0.01 for new samples, smaller is better.

    >>> memorisation(torch.tensor([[1.0], [5.0]]), torch.tensor([[1.0], [5.0]]), torch.tensor([[2.0], [7.0]]))
    {'nearest': 0.0, 'copies': 1.0}
    """
    generated, train, held_out = matrices(1, generated=generated, train=train, held_out=held_out).values()
    new, known = nearest(generated, train), nearest(held_out, train)
    if not known.any():
        raise UserError("every held-out sample is a training sample", "hold out real samples that were not trained on")
    return {"nearest": float(new.mean() / known.mean()), "copies": float((new <= known.quantile(0.01)).double().mean())}


def _radii(x: Tensor, k: int) -> Tensor:
    """`(N,)` distance of each sample to its k-th neighbour; the first of k + 1 is the sample itself."""
    return torch.cat([d.topk(k + 1, largest=False).values[:, -1] for d in distances(x, x)])


def _share_inside(x: Tensor, centres: Tensor, k: int) -> float:
    """Share of `x` within the k-th neighbour's distance of any centre."""
    widths = _radii(centres, k)
    return float(torch.cat([(d <= widths).any(1) for d in distances(x, centres)]).double().mean())
