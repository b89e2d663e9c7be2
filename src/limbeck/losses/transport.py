"""Moving one set of points onto another at the least cost, softened by an entropy (Sinkhorn), all in the log domain.

Shapes: cost `(..., N, M)`. Gradients flow through the unrolled iterations: plan and distance are both differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses._rows import check_positive, check_rows, check_same, tempered, wide


def sinkhorn(
    cost: Tensor,
    *,
    epsilon: float = 0.1,
    iterations: int = 20,
    row_mass: Tensor | None = None,
    column_mass: Tensor | None = None,
) -> Tensor:
    """The plan P = diag(u) exp(-cost / epsilon) diag(v), rows then columns scaled to their masses, `iterations` times.

    The last step scales columns: column sums are exact, row sums approach their masses. Cuturi (arXiv 1306.0895).

    Args:
        cost: `(..., N, M)`.
        epsilon: strength of the entropy; small is sharp and needs more iterations.
        iterations: rounds of rows and columns.
        row_mass: `(..., N)` what leaves each row; 1/N unless given. Zero is allowed.
        column_mass: `(..., M)` what arrives in each column; 1/M unless given. Zero is allowed.

    >>> sinkhorn(torch.tensor([[0.0, 9.0], [9.0, 0.0]])).round(decimals=3)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    check_positive(epsilon, "epsilon")
    log_k = -wide(cost) / epsilon
    n, m = cost.shape[-2:]
    row_shape, column_shape = cost.shape[:-1], (*cost.shape[:-2], m)
    for mass, shape, what in ((row_mass, row_shape, "row mass"), (column_mass, column_shape, "column mass")):
        if mass is not None and mass.ndim > 1:
            check_rows(shape, mass, what)
    log_a = log_k.new_tensor(1.0 / max(n, 1)).log() if row_mass is None else wide(row_mass).log().unsqueeze(-1)
    log_b = log_k.new_tensor(1.0 / max(m, 1)).log() if column_mass is None else wide(column_mass).log().unsqueeze(-2)
    f, g = torch.zeros_like(log_k[..., :1]), torch.zeros_like(log_k[..., :1, :])
    for _ in range(iterations):
        f = log_a - (log_k + g).logsumexp(-1, keepdim=True)
        g = log_b - (log_k + f).logsumexp(-2, keepdim=True)
    return (log_k + f + g).exp()


def sinkhorn_distance(
    cost: Tensor,
    *,
    epsilon: float = 0.1,
    iterations: int = 20,
    row_mass: Tensor | None = None,
    column_mass: Tensor | None = None,
) -> Tensor:
    """sum_ij P_ij cost_ij with P = `sinkhorn(cost)`: `(...)` one value for each cost matrix. Arguments as in `sinkhorn`.

    >>> sinkhorn_distance(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), row_mass=torch.tensor([1.0, 0.0]))  # half the mass must move
    tensor(0.5000)
    """
    plan = sinkhorn(cost, epsilon=epsilon, iterations=iterations, row_mass=row_mass, column_mass=column_mass)
    return (plan * wide(cost)).sum((-2, -1))


def batch_transport(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
) -> Tensor:
    """sum_ij P_ij W_ij, W_ij = |softmax(student_i / T) - softmax(teacher_j / T)|_1, P = `sinkhorn` with mass 1 a row and a column.

    The plan's columns sum to exactly 1 and its whole mass is B: the value grows with the batch (the paper scales it by 0.001 at
    B = 16..32). It lets student i match teacher j, so it is never used alone. Cui et al., SinKD (arXiv 2402.17110).

    Args:
        student_logits: `(B, C)`.
        teacher_logits: `(B, C)`.
        temperature: T; no factor T^2.
        epsilon, iterations: as in `sinkhorn`.

    >>> batch_transport(torch.eye(2) * 90, torch.zeros(2, 2))  # every student is 1 away from every teacher, twice
    tensor(2.)
    """
    check_same(student_logits, teacher_logits)
    s = F.softmax(tempered(student_logits, temperature), -1)
    t = F.softmax(tempered(teacher_logits, temperature), -1)
    ones = s.new_ones(len(s))
    return sinkhorn_distance(torch.cdist(s, t, p=1.0), epsilon=epsilon, iterations=iterations, row_mass=ones, column_mass=ones)
