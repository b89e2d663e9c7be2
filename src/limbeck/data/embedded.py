"""Real data that is always there: scikit-learn's digits and tables, glyphs of matplotlib's fonts, Fashion-MNIST from Debian."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.data.source import Source
from limbeck.data.split import TensorSplit
from limbeck.errors import UserError

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package `dataset-fashion-mnist` puts its files."""

FASHION_CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def digits() -> Source:
    """1797 handwritten digits, `(1, 8, 8)` floats in [0, 1]; 450 are drawn for testing (scikit-learn)."""
    rows = torch.from_numpy(_digit_rows())
    inputs = rows[:, :-1].float().div_(16).view(-1, 1, 8, 8)
    classes = tuple(str(n) for n in range(10))
    return Source(TensorSplit(inputs, rows[:, -1].long()), classes=classes, images=True, test_count=450)


def _digit_rows() -> np.ndarray:
    """`(1797, 65)` pixels and digit, from scikit-learn's own file: importing the whole package for it would take seconds of every run."""
    found = importlib.util.find_spec("sklearn")
    places = [] if found is None else list(found.submodule_search_locations or [])
    for place in places:
        if (file := Path(place, "datasets", "data", "digits.csv.gz")).is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return np.column_stack([loaded.data, loaded.target])


def _table(name: str) -> Source:
    import sklearn.datasets

    loaded = getattr(sklearn.datasets, f"load_{name}")()
    split = TensorSplit(torch.from_numpy(loaded.data).float(), torch.from_numpy(loaded.target).long())
    return Source(split, classes=tuple(str(n) for n in loaded.target_names), standardise=True, test_count=0.25)


def wine() -> Source:
    """178 wines of three growers, 13 measurements (scikit-learn)."""
    return _table("wine")


def breast_cancer() -> Source:
    """569 tumours, malignant or benign, 30 measurements (scikit-learn)."""
    return _table("breast_cancer")


def iris() -> Source:
    """150 irises of three species, 4 measurements (scikit-learn)."""
    return _table("iris")


def fashion_mnist() -> Source:
    """60000 + 10000 pictures of clothes, `(1, 28, 28)` floats in [0, 1] (Debian package dataset-fashion-mnist).

    Raises:
        UserError: the files are not there.
    """
    from limbeck.data.idx import read_idx_folder

    if not FASHION_FOLDER.is_dir():
        raise UserError(
            f"fashion-mnist is not installed: no folder {FASHION_FOLDER}",
            "`apt-get install dataset-fashion-mnist`, or name the folder of its IDX files as idx:<folder>",
        )
    source = read_idx_folder(str(FASHION_FOLDER))
    source.classes = FASHION_CLASSES
    return source


def glyphs(size: int = 16, characters: str | None = None, classes: int = 62, jitters: int = 8) -> Source:
    """Letters, digits and signs in every DejaVu face of matplotlib; see `limbeck.data.glyphs.render`."""
    from limbeck.data.glyphs import render

    return render(size, characters, classes, jitters)


def stdlib_graphs(packages: tuple[str, ...] = ("email", "asyncio"), least: int = 20, most: int = 150, split_seed: int = 0) -> Source:
    """About 870 syntax trees of functions of Python's standard library; the class is the package.

    See `limbeck.data.graphs.stdlib_graphs`.
    """
    from limbeck.data import graphs

    return graphs.stdlib_graphs(packages, least, most, split_seed)


EMBEDDED: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "glyphs": glyphs,
    "wine": wine,
    "breast-cancer": breast_cancer,
    "iris": iris,
    "fashion-mnist": fashion_mnist,
    "stdlib-graphs": stdlib_graphs,
}
"""Embedded data by name."""

_FACTS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "digits": (1797, 10, (1, 8, 8)),
    "glyphs": (5952, 62, (1, 16, 16)),
    "wine": (178, 3, (13,)),
    "breast-cancer": (569, 2, (30,)),
    "iris": (150, 3, (4,)),
    "fashion-mnist": (70000, 10, (1, 28, 28)),
    "stdlib-graphs": (869, 2, (131,)),  # of Python 3.11; other versions differ a little
}


def listing() -> list[dict[str, Any]]:
    """One row for each embedded data set: name, samples, classes, shape, source, and whether it is on this machine."""
    rows = []
    for name, (samples, classes, shape) in _FACTS.items():
        source = (EMBEDDED[name].__doc__ or "").splitlines()[0]
        here = name != "fashion-mnist" or FASHION_FOLDER.is_dir()
        rows.append({"name": name, "samples": samples, "classes": classes, "shape": list(shape), "source": source, "available": here})
    return rows
