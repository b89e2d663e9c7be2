"""Five real domains of text that lie on every machine: programs, docstrings, encoding tables, licences and readmes, numbers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from limbeck.data.choose import amount, generator
from limbeck.data.split import Split
from limbeck.data.text.rows import Corpus, Row, divide, draw
from limbeck.data.text.stdlib import functions, identity_of, library_files, package_sizes
from limbeck.errors import UserError, unknown

NAMES = ("code", "docstrings", "encodings", "licences", "numbers")
"""The domains, in the order of their numbers."""

_TABLES = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")


def _code(found: list[Row], groups: list[str]) -> None:
    for file in library_files():
        found.append(Row(text=file.text, place=file.name))
        groups.append(file.package)


def _docstrings(found: list[Row], groups: list[str]) -> None:
    for file in library_files():
        for function in functions(file):
            found.append(Row(text=function.docstring, place=function.place))
            groups.append(file.package)


def _encodings(found: list[Row], groups: list[str]) -> None:
    for file in library_files(("encodings",)):
        found.append(Row(text=file.text, place=file.name))
        groups.append(file.name)


def _licences(found: list[Row], groups: list[str]) -> None:
    """Licences and descriptions of the installed packages; a paragraph that several packages share stays with the first."""
    seen: set[str] = set()
    packages = {(d.metadata["Name"] or "").lower(): d for d in importlib.metadata.distributions()}
    for name in sorted(n for n in packages if n):
        texts = [packages[name].metadata.get_payload() or ""]
        for path in sorted(packages[name].files or [], key=str):
            if ".dist-info" in str(path) and path.name.upper().startswith(("LICEN", "COPYING", "NOTICE", "README", "AUTHORS")):
                try:
                    texts.append(path.read_text(encoding="utf-8"))
                except (OSError, UnicodeDecodeError):
                    continue  # listed but not there, or in an older encoding
        own = []
        for paragraph in "\n\n".join(texts).replace("\r\n", "\n").split("\n\n"):
            key = " ".join(paragraph.split()).lower()
            if len(key) > 20 and key not in seen:
                seen.add(key)
                own.append(paragraph.strip("\n"))
        if own:
            found.append(Row(text="\n\n".join(own) + "\n", place=name))
            groups.append(name)


def _numbers(found: list[Row], groups: list[str]) -> None:
    """Rows of scikit-learn's tables as they would be printed, 20 rows a document."""
    import sklearn.datasets

    for table in _TABLES:
        values = np.asarray(getattr(sklearn.datasets, f"load_{table}")().data)
        for first in range(0, len(values), 20):
            lines = [" ".join(f"{v:.4g}" for v in row) for row in values[first : first + 20]]
            found.append(Row(text="\n".join(lines) + "\n", place=f"{table} {first}"))
            groups.append(f"{table} {first}")


_READERS = dict(zip(NAMES, (_code, _docstrings, _encodings, _licences, _numbers)))


def stdlib_domains(shares: dict[str, float], seed: int = 0, domains: list[str] | None = None, most: int = 1_000_000) -> Corpus:
    """Texts of five domains: programs, docstrings, encoding tables, licences and readmes, numbers; split by package or file.

    Args:
        shares, seed: of the split; code and docstrings of one package are always in the same part; numbers are split by blocks of 20 rows.
        domains: which of `NAMES`, in this order; None takes all.
        most: characters of a domain's training part at most; whole documents are drawn. Test and valid keep the same proportion.

    Raises:
        UserError: an unknown domain.
    """
    names = tuple(domains or NAMES)
    for name in names:
        if name not in NAMES:
            raise unknown("domain", str(name), NAMES)
    if len(set(names)) < len(names):
        raise UserError(f"domains are {', '.join(names)}", "name each once")
    identity = ["3", "stdlib-domains", names, shares, seed, most, identity_of(library_files()), identity_of(library_files(("encodings",)))]
    if "licences" in names:
        identity.append(sorted({(d.metadata["Name"] or "", d.version) for d in importlib.metadata.distributions()}))
    if "numbers" in names:
        identity.append(importlib.metadata.version("scikit-learn"))
    made: list[dict[str, list[Row]]] = []  # read when the first part is asked for, and then held: a few million characters

    def read(part: str) -> Iterator[Row]:
        if not made:
            made.append(_divided(names, shares, seed, most))
        return iter(made[0][part])

    reads = {part: partial(read, part) for part in ("train", "test", "valid") if part == "train" or shares[part]}
    return Corpus("stdlib-domains", identity, reads, "text", "causal-lm", domains=names)


def _divided(names: tuple[str, ...], shares: dict[str, float], seed: int, most: int) -> dict[str, list[Row]]:
    """Rows by part, in the order of the domains."""
    packages = divide(package_sizes(library_files()), shares, seed)
    parts: dict[str, list[Row]] = {"train": [], "test": [], "valid": []}
    for number, name in enumerate(names):
        found: list[Row] = []
        groups: list[str] = []
        _READERS[name](found, groups)
        where = packages if name in ("code", "docstrings") else _by_group(found, groups, shares, seed)
        total = sum(len(row.text or "") for row in found)
        room = min(1.0, most / max(1.0, total * (1 - sum(shares.values()))))
        for part in parts:
            rows = [row for row, group in zip(found, groups) if where[group] == part]
            parts[part] += [replace(row, domain=number) for row in _some(rows, room, seed)]
    return parts


def _by_group(rows: list[Row], groups: list[str], shares: dict[str, float], seed: int) -> dict[str, str]:
    sizes: dict[str, int] = {}
    for row, group in zip(rows, groups):
        sizes[group] = sizes.get(group, 0) + len(row.text or "")
    return divide(sizes, shares, seed)


def _some(rows: list[Row], share: float, seed: int) -> list[Row]:
    """Rows in their order that together have about `share` of the characters (at least one row)."""
    wanted = share * sum(len(row.text or "") for row in rows)
    kept, have = set(), 0
    for i in sorted(range(len(rows)), key=lambda i: draw(seed, "some", rows[i].place)):
        size = len(rows[i].text or "")
        if not kept or have + size <= wanted:
            kept.add(i)
            have += size
    return [row for i, row in enumerate(rows) if i in kept]


def mixed(split: Split, names: tuple[str, ...], mix: dict[str, float], count: int | float | None, seed: int) -> Tensor:
    """Positions of samples drawn so that domains have given shares.

    Args:
        split: with `domains`.
        names: of the domains.
        mix: share of each domain by name, summing to 1; a domain that is not named gets none.
        count: samples in all, or a share of what there is; None takes as many as the scarcest domain allows.
        seed: of the draw.

    Raises:
        UserError: an unknown domain, shares that do not sum to 1, or too few samples of a domain.
    """
    own = getattr(split, "domains", None)
    if own is None:
        raise UserError("mix was asked for, but the data has no domains", "leave it out, or take stdlib-domains")
    for name, share in mix.items():
        if name not in names:
            raise unknown("domain", str(name), names)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or share < 0:
            raise UserError(f"the share of {name} is {share!r}", "give a number between 0 and 1")
    if abs(sum(mix.values()) - 1) > 1e-6:
        raise UserError(f"the shares of mix sum to {sum(mix.values()):g}", "make them sum to 1")
    pools = {name: (own == names.index(name)).nonzero()[:, 0] for name, share in mix.items() if share > 0}
    most = min(int(len(pool) / mix[name] + 1e-9) for name, pool in pools.items())
    total = most if count is None else amount(count, len(split), "train")
    chosen = []
    for name, pool in pools.items():
        wanted = round(total * mix[name])
        if wanted > len(pool):
            raise UserError(
                f"the mix asks for {wanted} samples of {name}, but there are {len(pool)}", f"ask for at most {most} (data.train)"
            )
        order = torch.randperm(len(pool), generator=generator(seed, names.index(name), 0xD0))
        chosen.append(pool[order[:wanted]])
    return torch.cat(chosen).sort().values
