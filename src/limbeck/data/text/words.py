"""Tables written out in words: measurements as text, the class as the answer, a tree's path as the reason."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from limbeck import storage
from limbeck.data.choose import generator, stratified
from limbeck.data.text.rows import Corpus, Row
from limbeck.errors import UserError, unknown

TABLES = ("wine", "breast-cancer", "iris")


def _short(name: str) -> str:
    """A column's name as one word."""
    return name.replace(" (cm)", "").replace("/", "-").replace("_", "-").replace(" ", "-")


def _written(names: list[str], values: np.ndarray, edges: np.ndarray | None = None) -> str:
    if edges is not None:
        return " ; ".join(f"{name} level-{1 + int((value > own).sum())}" for name, value, own in zip(names, values, edges.T))
    return " ; ".join(f"{name} {value:.3g}" for name, value in zip(names, values))


def _path(tree: Any, names: list[str], row: np.ndarray) -> str:
    """The decisions of a tree about one row, as a text; the class is not named."""
    inner, node, said = tree.tree_, 0, []
    while inner.children_left[node] >= 0:
        feature, threshold = inner.feature[node], inner.threshold[node]
        below = np.float32(row[feature]) <= threshold
        said.append(f"{names[feature]} {'at most' if below else 'above'} {threshold:.3g}")
        node = inner.children_left[node] if below else inner.children_right[node]
    return " , ".join(said)


def tables_in_words(
    shares: dict[str, float],
    seed: int = 0,
    table: str = "wine",
    bins: int | None = None,
    explain: str | None = None,
    depth: int = 3,
    trees: int = 100,
    kind: str = "auto",
) -> Corpus:
    """Rows of a scikit-learn table in words: "alcohol 14.1 ; malic-acid 1.6 ; ...", answered by the class.

    Every class is in each part in its share; a quarter of the rows is for testing when nobody says. With kind "causal-lm" prompts end
    with "=>".

    Args:
        shares, seed: of the split.
        table: "wine", "breast-cancer" or "iris".
        bins: numbers become words, "level-1" to "level-<bins>", by the quantiles of the training rows; None writes three digits.
        explain: "tree" adds a teacher's answers and reasons: a random forest learns all training rows (before `train` draws some); a tree
            of `depth` learns what the forest says of them, and its path through a row is the reason. The reason does not name the class.
        depth: of that tree.
        trees: of the forest.
        kind: of the task.

    Raises:
        UserError: an unknown table or explanation.
    """
    import sklearn.datasets

    if table not in TABLES:
        raise unknown("table", table, TABLES)
    if explain not in (None, "tree"):
        raise UserError(f"explain is {explain!r}", "write tree, or leave it out")
    if depth < 1 or trees < 1:
        raise UserError(f"depth is {depth} and trees is {trees}", "give at least 1 of each")
    if bins is not None and bins < 2:
        raise UserError(f"bins is {bins}", "give at least 2, or leave it out")
    loaded = getattr(sklearn.datasets, f"load_{table.replace('-', '_')}")()
    names, classes = [_short(n) for n in loaded.feature_names], tuple(str(n).replace("_", "-") for n in loaded.target_names)
    where = _where(np.asarray(loaded.target), shares, seed)
    edges = None
    if bins is not None:
        edges = np.quantile(loaded.data[where == "train"], np.linspace(0, 1, bins + 1)[1:-1], axis=0)
    end = " => " if kind == "causal-lm" else ""
    said: list[tuple[str | None, str | None]] = [(None, None)] * len(loaded.target)
    if explain:
        said = _teacher(loaded, names, classes, where == "train", depth, trees, seed)  # type: ignore[assignment]
    parts: dict[str, list[Row]] = {}
    for part in ("train", "test", "valid"):
        if part == "train" or shares[part]:
            parts[part] = [
                Row(
                    prompt=_written(names, loaded.data[i], edges) + end, completion=classes[loaded.target[i]], label=int(loaded.target[i]),
                    teacher=said[i][0], rationale=said[i][1], place=f"row {i}",
                )
                for i in np.flatnonzero(where == part).tolist()
            ]  # fmt: skip
    shown = {p: [[r.prompt, r.completion, r.teacher, r.rationale] for r in rows] for p, rows in parts.items()}
    identity = ["2", "tables-in-words", storage.fingerprint(shown)]
    reads = {part: partial(iter, rows) for part, rows in parts.items()}
    return Corpus("tables-in-words", identity, reads, "pair", "seq2seq", classes=classes, reasons=True)


def _where(labels: np.ndarray, shares: dict[str, float], seed: int) -> np.ndarray:
    """The part of each row; each part has every class in its share."""
    import torch

    where = np.full(len(labels), "train", dtype=object)
    for number, part in enumerate(("test", "valid")):
        if shares[part]:
            free = np.flatnonzero(where == "train")
            count = max(1, round(shares[part] * len(labels)))
            where[free[stratified(torch.from_numpy(labels[free]).long(), len(free), count, seed + number).numpy()]] = part
    return where


def _teacher(
    loaded: Any, names: list[str], classes: tuple[str, ...], train: np.ndarray, depth: int, trees: int, seed: int
) -> list[tuple[str, str]]:
    """(answer, reason) of a random forest and its surrogate tree for every row."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.tree import DecisionTreeClassifier

    state = generator(seed, 0x7EE).initial_seed() % 2**31
    forest = RandomForestClassifier(trees, random_state=state).fit(loaded.data[train], loaded.target[train])
    answers = forest.predict(loaded.data)
    surrogate = DecisionTreeClassifier(max_depth=depth, random_state=state).fit(loaded.data[train], answers[train])
    return [(classes[answer], _path(surrogate, names, row)) for answer, row in zip(answers, loaded.data)]
