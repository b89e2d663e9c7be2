"""The arms of `vocabulary.py`: a divergence from hidden states and output matrices, by limbeck, in plain torch, and by three peers.

Every arm is called with hidden states (N, H) and matrix (V, H) of the student, those of the teacher, which positions are scored (N,), and
the kind: "forward" KL(t, s), "reverse" KL(s, t), "js" with weight 0.5, or "top64": forward KL over the teacher's 64 likeliest tokens and
one bucket for the rest, the teacher's law being given as stored ids and log-probabilities. It returns the mean over what is scored.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peers import Absent, need
from torch import Tensor

TOP = 64
BETAS = {"forward": 0.0, "js": 0.5, "reverse": 1.0}
Inputs = tuple[Tensor, Tensor, Any, Any, Tensor]
Arm = Callable[..., Tensor]


def naive(student: Tensor, matrix: Tensor, teacher: Tensor, other: Tensor, scored: Tensor, kind: str) -> Tensor:
    """All logits at once, as in a plain training script."""
    log_s = F.log_softmax(student @ matrix.t(), -1)
    if kind == "top64":
        rows = _bucketed(log_s, teacher, other)
    else:
        rows = _rows(log_s, F.log_softmax((teacher @ other.t()).detach(), -1), kind)
    return (rows * scored).sum() / scored.sum()


def _rows(log_s: Tensor, log_t: Tensor, kind: str) -> Tensor:
    if kind == "forward":
        return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    if kind == "reverse":
        return F.kl_div(log_t, log_s, reduction="none", log_target=True).sum(-1)
    log_m = torch.logaddexp(log_s, log_t) - math.log(2)
    return sum(0.5 * F.kl_div(log_m, own, reduction="none", log_target=True).sum(-1) for own in (log_s, log_t))  # type: ignore[return-value]


def _bucketed(log_s: Tensor, ids: Tensor, logs: Tensor) -> Tensor:
    """Forward KL over k tokens and the rest; (N, V) log-probabilities, (N, k) ids and log-probabilities of the teacher."""
    tail = (1 - logs.exp().sum(-1)).clamp(1e-8, 1 - 1e-8)
    inside = torch.zeros_like(log_s, dtype=torch.bool).scatter_(1, ids, True)
    own_tail = torch.logsumexp(log_s.masked_fill(inside, -torch.inf), -1)
    norm = torch.log(logs.exp().sum(-1) + tail)
    log_t, log_tail = logs - norm[:, None], tail.log() - norm
    return (log_t.exp() * (log_t - log_s.gather(1, ids))).sum(-1) + log_tail.exp() * (log_tail - own_tail)


def limbeck() -> Arm:
    """`divergence` of laws without the rows that do not count."""
    from limbeck.losses.vocabulary import Law, Sparse, divergence

    def arm(student: Tensor, matrix: Tensor, teacher: Tensor, other: Tensor, scored: Tensor, kind: str) -> Tensor:
        law = Law(student, matrix)
        told = Sparse(teacher, other, len(matrix)) if kind == "top64" else Law(teacher, other)
        if not scored.all():
            law, told = law[scored], told[scored]
        return divergence(law, told, "forward" if kind == "top64" else kind)  # type: ignore[arg-type]

    return arm


def trl() -> Arm:
    """TRL's `generalized_jsd_loss` on all logits."""
    loss = need("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss

    def arm(student: Tensor, matrix: Tensor, teacher: Tensor, other: Tensor, scored: Tensor, kind: str) -> Tensor:
        z, u = student @ matrix.t(), (teacher @ other.t()).detach()
        labels = torch.where(scored, 0, -100)
        return loss(z[None], u[None], labels=labels[None], beta=BETAS[kind], reduction="batchmean")

    return arm


def liger(size: int) -> Callable[[], Arm]:
    """Liger's chunked distillation loss, soft part only; compiled on a GPU, where that is its purpose."""

    def made() -> Arm:
        loss_of = need("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDLoss

        def arm(student: Tensor, matrix: Tensor, teacher: Tensor, other: Tensor, scored: Tensor, kind: str) -> Tensor:
            loss = loss_of(0.0, 1.0, beta=BETAS[kind], compiled=student.is_cuda, chunk_size=size)
            return loss(student, matrix, teacher, other, torch.where(scored, 0, -100))

        return arm

    return made


def torchtune() -> Arm:
    """torchtune's losses with chunked outputs, eight chunks; its forward KL leaves the teacher's entropy out of the value."""
    losses = need("torchtune.modules.loss")
    made = {"forward": losses.ForwardKLWithChunkedOutputLoss(), "reverse": losses.ReverseKLWithChunkedOutputLoss()}

    def arm(student: Tensor, matrix: Tensor, teacher: Tensor, other: Tensor, scored: Tensor, kind: str) -> Tensor:
        z = [part @ matrix.t() for part in student[None].chunk(8, 1)]
        u = [(part @ other.t()).detach() for part in teacher[None].chunk(8, 1)]
        return made[kind](z, u, torch.where(scored, 0, -100)[None])

    return arm


ARMS: dict[str, Callable[[], Arm]] = {
    "naive": lambda: naive,
    "limbeck": limbeck,
    "trl": trl,
    "liger": liger(1024),
    "liger128": liger(128),
    "torchtune": torchtune,
}
TITLES = {
    "trl": "TRL generalized_jsd_loss",
    "liger": "Liger, chunk 1024 (its default)",
    "liger128": "Liger, chunk 128",
    "torchtune": "torchtune",
}
LACKS = {("torchtune", "js"): "has no Jensen-Shannon divergence", **{(name, "top64"): "takes no stored top tokens" for name in TITLES}}
VALUELESS = {("torchtune", "forward")}


PACKAGES = {"trl": "trl", "liger": "liger_kernel", "liger128": "liger_kernel", "torchtune": "torchtune"}


def lacking(name: str, kind: str) -> str | None:
    """Why an arm need not even be tried, if so."""
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        return "not installed here; `make bench` installs it"
    return LACKS.get((name, kind))


def made(name: str, kind: str) -> Arm:
    """An arm.

    Raises:
        Absent: the peer is missing, or does not have this divergence.
    """
    if (why := lacking(name, kind)) is not None:
        raise Absent(why)
    return ARMS[name]()
