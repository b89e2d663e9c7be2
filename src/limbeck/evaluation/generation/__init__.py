"""How good generated samples are: distances and neighbourhoods of their features against those of real samples.

Shapes: N samples, D features; the two sides may differ in N, never in D. All sums are in float64 on the CPU; nothing is drawn but the
directions of `sliced_distance`, by a seed. Figures depend on the features, on N and on k: compare only such as share all three, and
read each beside its floor, the same figure of one half of the real samples against the other.
"""

from __future__ import annotations

from torch import Tensor

from limbeck.evaluation.generation._features import check_k, matrices
from limbeck.evaluation.generation.distances import frechet_distance, kernel_distance, sliced_distance
from limbeck.evaluation.generation.neighbours import class_diversity, density_coverage, memorisation, precision_recall

__all__ = [
    "class_diversity",
    "density_coverage",
    "frechet_distance",
    "kernel_distance",
    "memorisation",
    "precision_recall",
    "quality",
    "sliced_distance",
]


def quality(
    real: Tensor,
    generated: Tensor,
    real_labels: Tensor | None = None,
    generated_labels: Tensor | None = None,
    train: Tensor | None = None,
    *,
    k: int = 5,
    directions: int = 128,
    seed: int = 0,
) -> dict[str, float]:
    """All measures of this module at once; sources and ranges stand at each function.

    Args:
        real: `(N, D)` features of real samples, not of the training split when `train` is given. generated: `(M, D)`.
        real_labels: `(N,)`; generated_labels: `(M,)`: the classes they were asked to be of.
        train: `(T, D)` features of the samples trained on; `real` are then the held-out ones.
        k: neighbour of precision, recall, density and coverage.
        directions, seed: of `sliced_distance`.

    Returns:
        `feature_distance` (Frechet), `kernel_distance`, `sliced_distance`: smaller is better. `precision`, `recall`, `density`,
        `coverage`: larger is better. With generated labels `diversity`, with real ones `real_diversity`, what to read it against.
        With `train`, `nearest` (1 is right) and `copies` (smaller is better).
    """
    check_k(k)
    real, generated = matrices(k + 1, real=real, generated=generated).values()
    figures = {
        "feature_distance": frechet_distance(real, generated),
        "kernel_distance": kernel_distance(real, generated),
        "sliced_distance": sliced_distance(real, generated, directions, seed),
        **precision_recall(real, generated, k),
        **density_coverage(real, generated, k),
    }
    if generated_labels is not None:
        figures["diversity"] = class_diversity(generated, generated_labels)
    if real_labels is not None:
        figures["real_diversity"] = class_diversity(real, real_labels)
    if train is not None:
        figures |= memorisation(generated, train, held_out=real)
    return figures
