"""The losses by name: cross-entropy to tokens, divergences from a teacher."""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from limbeck.errors import UserError, unknown
from limbeck.losses.vocabulary import dense
from limbeck.losses.vocabulary.fused import Kernel, Plan, scored
from limbeck.losses.vocabulary.law import Law, Sparse
from limbeck.losses.vocabulary.sparse import bucketed, renormalised

Reduction = Literal["mean", "sum", "none"]
Kind = Literal[
    "forward", "reverse", "js", "skew", "skew-reverse", "alpha-beta", "alpha", "tv", "adaptive", "interpolated", "decoupled"
]
KINDS: dict[str, Kernel] = {
    "forward": dense.forward,
    "reverse": dense.reverse,
    "js": dense.js,
    "skew": dense.skew,
    "skew-reverse": dense.skew_reverse,
    "alpha-beta": dense.alpha_beta,
    "alpha": dense.alpha,
    "tv": dense.total_variation,
    "adaptive": dense.adaptive,
    "interpolated": dense.interpolated,
    "decoupled": dense.decoupled,
}
BUCKET = ("forward", "reverse", "js", "skew", "tv")
"""Kinds that are defined against a stored top-k with its tail as one bucket."""


def cross_entropy(
    student: Law,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    total: float | Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """-sum_v p_v log s_v with p = (1 - label_smoothing) [v = target] + label_smoothing / V, over chunks of rows.

    Args:
        student: N positions, all scored; masked ones are left out before (`law[mask]`).
        targets: `(N,)` token numbers, 0 to V - 1.
        weight: `(N,)` a factor a row.
        label_smoothing: between 0 and 1; Szegedy et al. (arXiv 1512.00567).
        reduction: "mean" is the sum over `total`; "sum"; "none" gives `(N,)`.
        total: what the sum is divided by, N unless given: the number of scored positions of the whole batch where this is a part of it.
        chunk: rows at a time; `chunk_rows` unless given.

    Returns:
        A scalar or `(N,)` in float32 (float64 for float64). Zero for an empty law.

    Raises:
        UserError: shapes that do not fit, a target outside the vocabulary (looked for on a CPU only).

    >>> cross_entropy(Law(dense=torch.zeros(3, 8)), torch.tensor([0, 4, 7]))  # ln 8
    tensor(2.0794)
    """
    if not 0 <= label_smoothing <= 1:
        raise UserError(f"the label smoothing is {label_smoothing}", "use a number between 0 and 1")
    plan = Plan(dense.cross_entropy, by_row={"target": _targets(targets, student)}, shape={"smoothing": label_smoothing}, chunk=chunk)
    return scored(student, plan, weight, reduction, total)


def divergence(
    student: Law,
    teacher: Law | Sparse,
    kind: Kind = "forward",
    *,
    temperature: float | Tensor = 1.0,
    scale_temperature: bool = False,
    weight: Tensor | None = None,
    targets: Tensor | None = None,
    reduction: Reduction = "mean",
    total: float | Tensor | None = None,
    chunk: int | None = None,
    rest: Literal["bucket", "renormalise"] = "bucket",
    **shape: float | Tensor,
) -> Tensor:
    """How far the student's law s is from the teacher's t, position by position, over chunks of rows.

    t = softmax(z_T / T), s = softmax(z_S / T). The teacher never gets a gradient. Kinds, with the numbers they take:

    | kind | value | source |
    | --- | --- | --- |
    | forward | KL(t, s) | Hinton et al. (arXiv 1503.02531) |
    | reverse | KL(s, t) | MiniLLM (arXiv 2306.08543) |
    | js | b KL(t, m) + (1 - b) KL(s, m), m = b t + (1 - b) s; beta = 0.5; beta 0: forward, 1: reverse | GKD (arXiv 2306.13649) |
    | skew | KL(t, a t + (1 - a) s); skew = 0.1 | DistiLLM (arXiv 2402.03898) |
    | skew-reverse | KL(s, (1 - a) t + a s); skew = 0.1 | the same |
    | alpha | (1 - sum t^a s^(1-a)) / (a (1 - a)); alpha = 0.5; 0: reverse, 1: forward | Amari (1985) |
    | alpha-beta | -1/(a b) sum [t^a s^b - a/(a+b) t^(a+b) - b/(a+b) s^(a+b)], a, b >= 0, limits by continuity; alpha = 0.2, beta = 0.7 |
      Cichocki et al. (2011); ABKD (arXiv 2505.04560) |
    | tv | 1/2 sum abs(t - s) | f-distill (arXiv 2307.15190) |
    | adaptive | (h KL(t, s) + r KL(s, t)) / (h + r); h, r: sum abs(t - s) over the teacher's likeliest tokens with mass 0.5 and over the
      rest, without gradient; head = 0.5 | AKL (arXiv 2404.02657) |
    | interpolated | -sum p log s, p = softmax((1 - x) z_S + x z_T) without gradient; progress = x, which must be given |
      TAID (arXiv 2501.16937) |
    | decoupled | a KL over {target, rest} + b KL inside the rest; alpha = 1, beta = 8; needs `targets` | DKD (arXiv 2203.08679) |

    Against `Sparse` (its log-probabilities are raised to 1/T): rest="bucket" compares k tokens and one tail (forward, reverse, js, skew,
    tv); rest="renormalise" takes the k tokens for the whole of the teacher (forward only), which makes the student too sure.

    Args:
        student, teacher: N positions each, over one vocabulary; hidden sizes may differ, padding of each matrix is cut before.
        kind: see above.
        temperature: T: a number, a scalar tensor or `(N,)`.
        scale_temperature: multiply by T^2 (not for "tv", which is never scaled).
        weight: `(N,)` a factor a row.
        targets: `(N,)` token numbers, for "decoupled".
        reduction, total, chunk: as in `cross_entropy`.
        rest: what a `Sparse` teacher's tail is taken for.
        **shape: the numbers of the kind.

    Returns:
        A scalar or `(N,)` in float32 (float64 for float64).

    Raises:
        UserError: two vocabularies, numbers of rows that differ, an unknown kind or number, a kind that a stored top-k does not define.

    >>> divergence(Law(dense=torch.zeros(1, 2)), Law(dense=torch.tensor([[50.0, 0.0]])))  # ln 2
    tensor(0.6931)
    """
    if kind not in KINDS:
        raise unknown("divergence", kind, KINDS)
    _same(student, teacher, temperature)
    _check_shape(kind, shape)
    by_row = {}
    if kind == "decoupled":
        if targets is None:
            raise UserError("the decoupled divergence needs `targets`", "give the token of each position, (N,)")
        by_row["target"] = _targets(targets, student)
    elif targets is not None:
        raise UserError(f"the divergence {kind!r} takes no `targets`", "only 'decoupled' does: drop them")
    kernel = _dense_kernel(kind, student)
    if isinstance(teacher, Sparse):
        kernel = _sparse_kernel(kind, rest)
    elif rest != "bucket":
        raise UserError(f"rest={rest!r} with a teacher that has all its logits", "`rest` belongs to a Sparse teacher: drop it")
    plan = Plan(kernel, teacher.detach(), temperature, by_row, shape, chunk)
    factor: float | Tensor = 1.0
    if scale_temperature and kind != "tv":
        factor = temperature * temperature
        if isinstance(factor, Tensor) and factor.ndim:
            weight, factor = factor if weight is None else weight * factor, 1.0
    return scored(student, plan, weight, reduction, total, factor)


def _targets(targets: Tensor, law: Law) -> Tensor:
    """Token numbers, checked."""
    if targets.shape != (len(law),):
        raise UserError(f"the targets have shape {tuple(targets.shape)}, the law has {len(law)} rows", "give one token a row: (N,)")
    if targets.is_floating_point() or targets.dtype is torch.bool:
        raise UserError(f"the targets are {targets.dtype}", "give token numbers (int64)")
    if targets.device.type == "cpu" and len(targets):
        low, high = targets.aminmax()
        if low < 0 or high >= law.width:
            raise UserError(
                f"targets run from {int(low)} to {int(high)}, the vocabulary has {law.width} tokens",
                "leave masked positions (-100) out of both: law[mask], targets[mask]",
            )
    return targets.long()


def _same(student: Law, teacher: Law | Sparse, temperature: float | Tensor) -> None:
    """One number of rows, one vocabulary, a temperature above 0."""
    if len(student) != len(teacher):
        raise UserError(f"the student has {len(student)} rows, the teacher {len(teacher)}", "take the same positions of both")
    if student.width != teacher.width:
        raise UserError(
            f"the student's vocabulary has {student.width} tokens, the teacher's {teacher.width}",
            "set `vocabulary` of both laws to the number of tokens they share if only padding differs; "
            "different tokenizers need a loss that aligns them",
        )
    if isinstance(teacher, Sparse) and teacher.device.type == "cpu" and teacher.ids.numel():
        low, high = teacher.ids.aminmax()
        if low < 0 or high >= teacher.width:
            raise UserError(
                f"the stored ids run from {int(low)} to {int(high)}, the vocabulary has {teacher.width} tokens",
                "the store was made for another vocabulary: fill it again with this teacher",
            )
    if isinstance(temperature, Tensor):
        if temperature.ndim and temperature.shape != (len(student),):
            raise UserError(
                f"the temperature has shape {tuple(temperature.shape)}, the law {len(student)} rows", "give one number, or one a row: (N,)"
            )
    elif not temperature > 0:
        raise UserError(f"the temperature is {temperature}", "use a temperature above 0")


_BOUNDS: dict[str, tuple[float, float, str]] = {
    "js.beta": (0.0, 1.0, "between 0 (forward) and 1 (reverse)"),
    "adaptive.head": (0.0, 1.0, "between 0 and 1: the mass of the teacher's head"),
    "interpolated.progress": (0.0, 1.0, "between 0 (the student itself) and 1 (the teacher)"),
    "alpha-beta.alpha": (0.0, float("inf"), "of 0 or more"),
    "alpha-beta.beta": (0.0, float("inf"), "of 0 or more"),
}


def _check_shape(kind: str, shape: dict[str, float | Tensor]) -> None:
    """Known names, numbers in range. Tensors are taken on trust: looking into them would wait for the device."""
    known = [name for name in inspect.signature(KINDS[kind]).parameters if name not in ("z", "u", "slope", "target")]
    for name, value in shape.items():
        if name not in known:
            raise unknown(f"number of the divergence {kind!r}", name, known)
        if isinstance(value, Tensor):
            if name != "progress" or value.ndim:
                raise UserError(f"{name} is a tensor of shape {tuple(value.shape)}", "give a number; `progress` may be a scalar tensor")
            continue
        low, high, words = _BOUNDS.get(f"{kind}.{name}", (float("-inf"), float("inf"), ""))
        if not low <= value <= high:
            raise UserError(f"{name} of the divergence {kind!r} is {value}", f"use a number {words}")
        if name == "skew" and not 0 <= value < 1:
            raise UserError(f"the skew is {value}", "use 0 <= skew < 1")
    if kind == "interpolated" and "progress" not in shape:
        raise UserError("the interpolated divergence needs `progress`", "give progress=x, from 0 (the student itself) to 1 (the teacher)")
    if kind == "alpha-beta" and shape.get("alpha", 1) == 0 and shape.get("beta", 1) == 0:
        raise UserError("alpha and beta are both 0", "set at least one of them above 0")


@cache
def _device_kernels() -> dict[str, Kernel]:
    """The kernels of triton, none where it is not installed (it comes with torch for CUDA)."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from limbeck.losses.vocabulary import fused_triton

    return fused_triton.KERNELS


def _dense_kernel(kind: str, student: Law) -> Kernel:
    """The kernel against all logits: triton's on CUDA in float32 where there is one, else torch's."""
    own = _device_kernels() if student.device.type == "cuda" and student.dtype is torch.float32 else {}
    return own.get(kind, KINDS[kind])


def _sparse_kernel(kind: str, rest: str) -> Kernel:
    """The kernel against a stored top-k."""
    if rest not in ("bucket", "renormalise"):
        raise unknown("treatment of the rest", rest, ("bucket", "renormalise"))
    if kind not in BUCKET:
        raise UserError(f"the divergence {kind!r} needs all the teacher's logits, not a top-k", f"use one of {', '.join(BUCKET)}")
    if rest == "renormalise":
        if kind != "forward":
            raise UserError(f"the divergence {kind!r} against renormalised top-k is infinite", "use rest='bucket' or 'forward'")
        return renormalised
    base = KINDS[kind]

    def kernel(z: Tensor, ids: Tensor, u: Tensor, slope: bool, **numbers: float) -> Tensor:
        return bucketed(base, z, ids, u, slope, **numbers)

    return kernel
