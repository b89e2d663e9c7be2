"""How every loss of `limbeck.losses` is called: one builder each, used by the tests of numerics.

A builder takes a `Draw`, which makes tensors of any style (plain, extreme, equal, ...), and gives a function and its tensors. The first
tensors are what learns; the function returns a tensor, or several, all of which are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from limbeck import losses
from limbeck.losses import vocabulary
from limbeck.losses.vocabulary import Law, Sparse

STYLES = ("plain", "signs", "one high", "sure teacher", "equal", "zero")
"""plain: normal numbers; signs: +-1e4; one high: one 1e4 and all others -1e4; sure teacher: student plain, teacher one-hot; equal: both
sides the same; zero: the student is all zeros."""


@dataclass
class Draw:
    """Makes the tensors of a call, all in float64; they are rounded afterwards.

    Attributes:
        rows, width: B and C (or D).
        style: one of `STYLES`; the first tensor asked for is the student's, later ones are the teacher's.
        hidden: no row is scored: masks are all false, labels all -1.
        seed: of the numbers.
    """

    rows: int = 6
    width: int = 5
    style: str = "plain"
    hidden: bool = False
    seed: int = 0
    asked: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def values(self, *shape: int) -> Tensor:
        """Logits or features; `(rows, width)` unless a shape is given."""
        shape = shape or (self.rows, self.width)
        self.asked += 1
        plain = 1.5 * torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        if self.style == "equal":
            return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        if self.style == "signs":
            return 1e4 * torch.where(plain > 0, 1.0, -1.0)
        if self.style == "one high" or (self.style == "sure teacher" and self.asked > 1):
            place = torch.randint(shape[-1], (*shape[:-1], 1), generator=self.generator)
            return torch.full(shape, -1e4, dtype=torch.float64).scatter(-1, place, 1e4)
        return torch.zeros_like(plain) if self.style == "zero" and self.asked == 1 else plain

    def labels(self, *shape: int) -> Tensor:
        """Class numbers; all -1 when nothing is scored."""
        found = torch.randint(self.width, shape or (self.rows,), generator=self.generator)
        return torch.full_like(found, -1) if self.hidden else found

    def mask(self, *shape: int) -> Tensor:
        """True where a row is scored: all but the last, or none."""
        mask = torch.ones(shape or (self.rows,), dtype=torch.bool)
        mask.view(-1)[-1:] = mask.numel() == 1
        return torch.zeros_like(mask) if self.hidden else mask


Made = tuple[Callable[..., Any], list[Tensor]]


@dataclass
class Call:
    """One way to call a loss.

    Attributes:
        build: makes function and tensors from a `Draw`.
        masked: whether a call can hide every row, and the result is then zero.
        gradient: whether it is differentiated (directions and measures are not).
        rounded: whether a part of it is computed in the type of the inputs on purpose (a network's own product, autograd's own gradient).
    """

    build: Callable[[Draw], Made]
    masked: bool = False
    gradient: bool = True
    rounded: bool = False


CALLS: dict[str, Call] = {}
"""Every call by "package.name" or "package.name variant"."""


def call(name: str, *, masked: bool = False, gradient: bool = True, rounded: bool = False, package: str = "limbeck.losses") -> Any:
    """Register a builder."""

    def keep(build: Callable[[Draw], Made]) -> Callable[[Draw], Made]:
        CALLS[f"{package}:{name}"] = Call(build, masked, gradient, rounded)
        return build

    return keep


# ---- student's and teacher's logits ----


def _pair(function: Callable[..., Tensor], **more: Any) -> Callable[[Draw], Made]:
    def build(draw: Draw) -> Made:
        mask = draw.mask()
        return lambda s, t: function(s, t, mask=mask, **more), [draw.values(), draw.values()]

    return build


def _plain_pair(function: Callable[..., Any], *shape: int, **more: Any) -> Callable[[Draw], Made]:
    def build(draw: Draw) -> Made:
        size = (draw.rows, *shape) if shape else ()
        return lambda s, t: function(s, t, **more), [draw.values(*size), draw.values(*size)]

    return build


for _name, _more in (
    ("forward_kl", {}), ("reverse_kl", {}), ("jeffreys", {}), ("jensen_shannon", {}), ("skew_kl", {}), ("alpha_divergence", {}),
    ("total_variation", {}), ("split_divergence", {"top": 2}), ("bernoulli_kl", {}), ("mse", {}), ("l1", {}), ("cosine_distance", {}),
    ("normalized_mse", {}), ("normalized_l1", {}), ("list_mle", {}),
):  # fmt: skip
    call(_name, masked=True)(_pair(getattr(losses, _name), **_more))
for _name, _more in (
    ("forward_kl", {"temperature": 4.0}), ("reverse_kl", {"temperature": 4.0}), ("skew_kl", {"reverse": True, "skew": 0.3}),
    ("alpha_divergence", {"alpha": 0.9}), ("jensen_shannon", {"beta": 0.1}),
):  # fmt: skip
    call(f"{_name} {_more}", masked=True)(_pair(getattr(losses, _name), **_more))
for _direction in ("forward", "reverse", "jeffreys", "js"):
    call(f"kl {_direction}", masked=True)(_pair(losses.kl, direction=_direction))
for _name in ("rkd_distance", "rkd_angle", "similarity_preserving", "pearson", "correlation", "cka", "batch_transport", "mean_distance",
              "barlow_twins", "gaussian_mmd", "info_nce", "score_identity fake", "field_loss", "score_surrogate"):  # fmt: skip
    if " " not in _name:
        call(_name)(_plain_pair(getattr(losses, _name)))
call("forward_kl fast")(_plain_pair(losses.forward_kl, temperature=2.0))
call("mse fast")(_plain_pair(losses.mse))
call("info_nce symmetric")(_plain_pair(losses.info_nce, symmetric=True, temperature=0.05))
call("channel_correlation")(_plain_pair(losses.channel_correlation, 3, 4))
call("attention_transfer")(_plain_pair(losses.attention_transfer, 3, 2, 2))
call("self_relation mse")(_plain_pair(losses.self_relation, 4, 6, heads=2))
for _kind in losses.generation.ADVERSARIAL:
    call(f"critic_loss {_kind}")(_plain_pair(losses.critic_loss, kind=_kind))
call("pixel_distance", gradient=False)(_plain_pair(losses.pixel_distance))
call("guided_prediction")(_plain_pair(losses.guided_prediction, scale=7.5))
call("entropic_prediction")(_plain_pair(losses.entropic_prediction, lam=0.25))
call("least_norm", gradient=False)(_plain_pair(losses.least_norm))
for _metric in losses.matching.METRICS:
    call(f"gradient_distance {_metric}")(lambda draw, m=_metric: (
        lambda s, t: losses.gradient_distance([s, s[0]], [t, t[0]], m), [draw.values(), draw.values()]))  # fmt: skip


@call("self_relation kl", masked=True)
def _self_relation(draw: Draw) -> Made:
    mask, shape = draw.mask(draw.rows, 4), (draw.rows, 4, 6)
    return lambda s, t: losses.self_relation(s, t, heads=2, mask=mask, kind="kl"), [draw.values(*shape), draw.values(*shape)]


# ---- logits and labels ----


def _labelled(function: Callable[..., Tensor], sides: int = 1, **more: Any) -> Callable[[Draw], Made]:
    def build(draw: Draw) -> Made:
        tensors = [draw.values() for _ in range(sides)]
        labels = draw.labels()
        return lambda *given: function(*given, labels, **more), tensors

    return build


call("cross_entropy", masked=True)(_labelled(losses.cross_entropy))
call("cross_entropy smooth", masked=True)(_labelled(losses.cross_entropy, label_smoothing=0.1, reduction="none"))
call("supervised_contrastive", masked=True)(_labelled(losses.supervised_contrastive))
call("decoupled_kd", masked=True)(_labelled(losses.decoupled_kd, 2))
call("plackett_luce", masked=True)(_labelled(losses.plackett_luce, 2))
call("plackett_luce top", masked=True)(_labelled(losses.plackett_luce, 2, topk=2))
call("target_enhanced_cross_entropy")(_labelled(losses.target_enhanced_cross_entropy, 2, eps=1.5))
call("target_enhanced_cross_entropy paper")(_labelled(losses.target_enhanced_cross_entropy, 2, variant="paper", eps=1.5))


@call("entropy", masked=True)
def _entropy(draw: Draw) -> Made:
    mask = draw.mask()
    return lambda x: losses.entropy(x, mask=mask), [draw.values()]


@call("soft_cross_entropy", masked=True)
def _soft_cross_entropy(draw: Draw) -> Made:
    mask = draw.mask()
    return lambda x, q: losses.soft_cross_entropy(x, q, mask=mask), [draw.values(), draw.values().softmax(-1)]


@call("binary_cross_entropy", masked=True)
def _binary_cross_entropy(draw: Draw) -> Made:
    tensors, labels = [draw.values()], torch.randint(2, (draw.rows, draw.width), generator=draw.generator)
    labels = torch.full_like(labels, -1) if draw.hidden else labels
    return lambda x: losses.binary_cross_entropy(x, labels), tensors


# ---- everything of a shape of its own ----


@call("attention_map")
def _attention_map(draw: Draw) -> Made:
    return losses.attention_map, [draw.values(draw.rows, 3, 2, 2)]


@call("norm_and_direction", masked=True)
def _norm_and_direction(draw: Draw) -> Made:
    mask = draw.mask()
    student, teacher = draw.values(), draw.values()
    direction = torch.nn.functional.normalize(teacher, dim=-1)
    return lambda s, d, n: losses.norm_and_direction(s, d, n, mask=mask), [student, direction, teacher.norm(dim=-1)]


@call("info_nce negatives")
def _info_nce(draw: Draw) -> Made:
    return lambda q, k, n: losses.info_nce(q, k, negatives=n), [draw.values(), draw.values(), draw.values(7, draw.width)]


def _three(function: Callable[..., Any]) -> Callable[[Draw], Made]:
    return lambda draw: (function, [draw.values(), draw.values(), draw.values()])


call("matching_direction", gradient=False)(_three(losses.matching_direction))
call("score_identity")(_three(losses.score_identity))
call("kernel_ridge_prediction")(_three(losses.kernel_ridge_prediction))
call("characteristic_discrepancy")(lambda draw: (losses.characteristic_discrepancy, [
    draw.values(), draw.values(), torch.randn(8, draw.width, generator=draw.generator).double()]))  # fmt: skip
for _kind in losses.generation.ADVERSARIAL:
    call(f"fooling_loss {_kind}")(lambda draw, k=_kind: (lambda x: losses.fooling_loss(x, k), [draw.values()]))


@call("gradient_penalty", rounded=True)
def _gradient_penalty(draw: Draw) -> Made:
    def penalty(x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_(True)
        return losses.gradient_penalty(torch.tanh(x.float() if x.dtype.itemsize < 4 else x).square().sum(1), x)

    return penalty, [draw.values()]


call("pseudo_huber")(lambda draw: (losses.pseudo_huber, [draw.values()]))
call("image_variation")(lambda draw: (losses.image_variation, [draw.values(draw.rows, 2, 4, 4)]))
call("statistics_distance")(lambda draw: (
    lambda m, v, rm, rv: losses.statistics_distance([m, m], [v, v], [rm, rv], [rv, rm]),
    [draw.values(draw.width) for _ in range(4)]))  # fmt: skip
for _kind in losses.score.WEIGHTS:
    call(f"level_weight {_kind}", gradient=False)(lambda draw, k=_kind: (
        lambda a: losses.level_weight(a, k), [torch.rand(draw.rows, generator=draw.generator).double()]))  # fmt: skip
call("later_place", gradient=False)(lambda draw: (
    lambda p: losses.later_place(p, 0.1, 0.02), [torch.rand(draw.rows, generator=draw.generator).double()]))  # fmt: skip
call("sinkhorn")(lambda draw: (lambda c: losses.sinkhorn(c.abs()), [draw.values()]))
call("sinkhorn_distance")(lambda draw: (lambda c: losses.sinkhorn_distance(c.abs()), [draw.values()]))


# ---- over a vocabulary ----

OF_WORDS = "limbeck.losses.vocabulary"


def _laws(kind: str, **more: Any) -> Callable[[Draw], Made]:
    def build(draw: Draw) -> Made:
        targets = draw.labels().clamp(min=0) if kind == "decoupled" else None
        tensors = [draw.values(), draw.values()]
        return lambda s, t: vocabulary.divergence(Law(dense=s), Law(dense=t.detach()), kind, targets=targets, **more), tensors

    return build


for _kind in vocabulary.KINDS:
    _given = {"progress": 0.4} if _kind == "interpolated" else {}
    call(f"divergence {_kind}", package=OF_WORDS)(_laws(_kind, **_given))
    call(f"divergence {_kind} T", package=OF_WORDS)(_laws(_kind, temperature=3.0, chunk=2, **_given))


def _sparse(kind: str, rest: str) -> Callable[[Draw], Made]:
    def build(draw: Draw) -> Made:
        def value(s: Tensor, t: Tensor) -> Tensor:
            wide = t.detach().double().log_softmax(-1)
            logs, ids = wide.topk(max(1, min(3, wide.shape[1])), -1)
            teacher = Sparse(ids, logs.to(torch.float64 if t.dtype is torch.float64 else torch.float32), wide.shape[1])
            return vocabulary.divergence(Law(dense=s), teacher, kind, rest=rest)

        return value, [draw.values(), draw.values()]

    return build


for _kind in ("forward", "reverse", "js", "skew", "tv"):
    call(f"divergence {_kind} of a stored top-k", package=OF_WORDS)(_sparse(_kind, "bucket"))
call("divergence forward of a stored top-k alone", package=OF_WORDS)(_sparse("forward", "renormalise"))


@call("divergence hidden", rounded=True, package=OF_WORDS)
def _hidden(draw: Draw) -> Made:
    def value(hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
        return vocabulary.divergence(Law(hidden=hidden, weight=weight, softcap=30.0), Law(dense=teacher.detach()), "reverse")

    return value, [draw.values(draw.rows, 4), draw.values(draw.width, 4), draw.values()]


@call("cross_entropy", package=OF_WORDS)
def _words(draw: Draw) -> Made:
    targets = draw.labels().clamp(min=0)
    return lambda s: vocabulary.cross_entropy(Law(dense=s), targets, label_smoothing=0.1), [draw.values()]


call("rowwise", package=OF_WORDS)(lambda draw: (
    lambda s, t: vocabulary.rowwise(lambda a, b: losses.jeffreys(a, b, reduction="none"), Law(dense=s), t),
    [draw.values(), draw.values()]))  # fmt: skip
call("facts", gradient=False, package=OF_WORDS)(lambda draw: (
    lambda s: tuple(v for k, v in vocabulary.facts(Law(dense=s)).items() if k != "argmax"), [draw.values()]))  # fmt: skip
call("overlap", gradient=False, package=OF_WORDS)(lambda draw: (
    lambda s, t: vocabulary.overlap(Law(dense=s), Law(dense=t)), [draw.values(), draw.values()]))  # fmt: skip
call("top_k", gradient=False, package=OF_WORDS)(lambda draw: (
    lambda s: vocabulary.top_k(Law(dense=s), 1).logs, [draw.values()]))  # fmt: skip
call("agreement", gradient=False, package=OF_WORDS)(lambda draw: (
    lambda s, t: vocabulary.agreement(Law(dense=s), Law(dense=t)).float(), [draw.values(), draw.values()]))  # fmt: skip

NO_LOSSES = {
    "limbeck.losses:annealed": "numbers in, numbers out",
    f"{OF_WORDS}:KINDS": "a table of names",
    f"{OF_WORDS}:Law": "what losses are called with",
    f"{OF_WORDS}:Sparse": "what losses are called with",
    f"{OF_WORDS}:chunk_rows": "counts rows",
}
"""Exported names that have no call, and why."""
