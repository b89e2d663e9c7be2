"""What laws say, without gradient and a chunk at a time: facts of one law, agreement of two."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.losses.vocabulary.chunks import Reader, block_rows, chosen, spans
from limbeck.losses.vocabulary.dense import dot, logs
from limbeck.losses.vocabulary.law import Law


def _each(read: Callable[..., None], laws: tuple[Law, ...], chunk: int | None, temperature: float = 1.0) -> None:
    """Call `read(rows, *logits)` on every block, logits over the temperature; the laws have equal rows and vocabularies."""
    first = laws[0]
    for other in laws[1:]:
        if (len(other), other.width) != (len(first), first.width):
            raise UserError(
                f"one law has {len(first)} rows over {first.width} tokens, the other {len(other)} over {other.width}",
                "take the same positions of both, and cut both to one `vocabulary`",
            )
    size = chosen(chunk, first)
    readers = [Reader(law, size, temperature) for law in laws]
    for rows in spans(len(first), size):
        logits = [reader(rows) for reader in readers]
        for part in spans(len(logits[0]), block_rows(first.width, first.device)):
            here = slice(rows.start + part.start, rows.start + part.stop)
            for reader, z in zip(readers, logits):
                reader.finish(z[part], here)
            read(here, *(z[part] for z in logits))


@torch.no_grad()
def facts(law: Law, targets: Tensor | None = None, *, chunk: int | None = None) -> dict[str, Tensor]:
    """Figures of each position, `(N,)` each: "entropy" in nats, "argmax", "log_normaliser" (log sum exp of the logits).

    Args:
        law: N positions.
        targets: `(N,)` token numbers; adds "log_probability" of them.
        chunk: rows at a time; `chunk_rows` unless given.
    """
    if targets is not None and (targets.shape != (len(law),) or targets.is_floating_point()):
        raise UserError(f"the targets are {targets.dtype} {tuple(targets.shape)}", f"give {len(law)} token numbers, one a row")
    blank = torch.empty(len(law), dtype=law.dtype, device=law.device)
    found = {"entropy": blank, "log_normaliser": torch.empty_like(blank), "argmax": torch.empty_like(blank, dtype=torch.int64)}
    if targets is not None:
        found["log_probability"] = torch.empty_like(blank)

    def read(rows: slice, z: Tensor) -> None:
        top, found["argmax"][rows] = z.max(1)
        own = None if targets is None else z.gather(1, targets[rows].long().unsqueeze(1)).squeeze(1)
        z.sub_(top.unsqueeze(1))
        p = z.exp()
        total = p.sum(1)
        log_total = total.log()
        found["log_normaliser"][rows] = top + log_total
        found["entropy"][rows] = log_total - dot(p, z).squeeze(1) / total
        if own is not None:
            found["log_probability"][rows] = own - top - log_total

    _each(read, (law,), chunk)
    return found


@torch.no_grad()
def overlap(p: Law, q: Law, *, temperature: float = 1.0, chunk: int | None = None) -> Tensor:
    """`(N,)` sum_v min(p_v, q_v) = 1 - total variation: how often a draft from one is accepted by the other in speculative sampling.

    Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), Theorem 3.5.
    """
    found = torch.empty(len(p), dtype=p.dtype, device=p.device)

    def read(rows: slice, a: Tensor, b: Tensor) -> None:
        found[rows] = torch.minimum(logs(a)[0], logs(b)[0].to(a.dtype)).sum(1)

    _each(read, (p, q), chunk, temperature)
    return found


@torch.no_grad()
def agreement(p: Law, q: Law, *, chunk: int | None = None) -> Tensor:
    """`(N,)` true where both laws have the same likeliest token (the first one where several are)."""
    found = torch.empty(len(p), dtype=torch.bool, device=p.device)

    def read(rows: slice, a: Tensor, b: Tensor) -> None:
        found[rows] = a.argmax(1) == b.argmax(1)

    _each(read, (p, q), chunk)
    return found
