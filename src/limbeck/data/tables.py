"""Tables in CSV and Parquet files: numeric columns in, one label column out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch

from limbeck.data.source import Source
from limbeck.data.split import TensorSplit, check_columns, label_name
from limbeck.errors import UserError
from limbeck.places import user_path


def number_labels(values: Any, where: str) -> tuple[torch.Tensor, tuple[str, ...]]:
    """`(N,)` class numbers and names from a column of numbers or strings; classes are in sorted order.

    Raises:
        UserError: missing values, or fractions, which are no classes.
    """
    import pandas

    series = pandas.Series(values)
    if series.isna().any():
        row = int(series.isna().to_numpy().argmax())
        raise UserError(f"{where}: the label of sample {row} is missing", "remove or fill these samples")
    if pandas.api.types.is_float_dtype(series):
        if (series % 1 != 0).any():
            raise UserError(f"{where}: the labels are fractions, such as {series[series % 1 != 0].iloc[0]}", "give whole numbers or names")
        series = series.astype("int64")
    codes, names = pandas.factorize(series, sort=True)
    return torch.from_numpy(codes.astype("int64")), tuple(str(n) for n in names)


def _source(frame: Any, path: Path, label: str | None, columns: list[str] | None) -> Source:
    import pandas

    frame.columns = [str(c) for c in frame.columns]
    names = list(frame.columns)
    if len(frame) == 0:
        raise UserError(f"{path} has no rows", "give at least one sample of each class")
    target = label_name(names, label, str(path))
    if target is None:
        raise UserError(f"{path} has no column named like a label; its columns are {', '.join(names[:12])}", "name it with label:")
    check_columns(columns, names, str(path))
    used = list(columns) if columns else [n for n in names if n != target]
    for column in used:
        if not pandas.api.types.is_numeric_dtype(frame[column]) and not pandas.api.types.is_bool_dtype(frame[column]):
            raise UserError(f"{path}: column {column!r} is not numeric", "make it so, or list the columns to use with columns:")
    if not used:
        raise UserError(f"{path} has no column besides the label {target!r}", "give numeric columns")
    labels, classes = number_labels(frame[target], str(path))
    inputs = torch.tensor(frame[used].to_numpy(dtype=numpy.float32, na_value=numpy.nan))
    return Source(TensorSplit(inputs, labels), classes=classes, standardise=True, note=[target, used])


def _file(path: str) -> Path:
    file = user_path(path)
    if not file.is_file():
        raise UserError(f"no file at {file}", "check the path")
    return file


def read_csv(path: str, label: str | None = None, columns: list[str] | None = None, separator: str = ",") -> Source:
    """A CSV file with a header line; columns are scaled by the mean and deviation of the training part.

    Args:
        path: the file, plain or compressed.
        label: the label's column; found by its name when None.
        columns: the columns to use; None takes all others, which must be numeric.
        separator: between fields.

    Raises:
        UserError: the file is missing or unreadable, has no rows, or a column is missing or not numeric.
    """
    import pandas

    file = _file(path)
    try:
        frame = pandas.read_csv(file, sep=separator)
    except Exception as error:  # parsers and decompressors raise a dozen kinds, all about the file or its separator
        raise UserError(f"{file} is not a readable CSV file: {error}", "check the file and its separator") from None
    return _source(frame, file, label, columns)


def read_parquet(path: str, label: str | None = None, columns: list[str] | None = None) -> Source:
    """A Parquet file, otherwise as `read_csv`.

    Raises:
        UserError: as `read_csv`; or pyarrow is not installed.
    """
    import pandas

    file = _file(path)
    try:
        frame = pandas.read_parquet(file)
    except ImportError:
        raise UserError("Parquet needs pyarrow, which is not installed", "`pip install 'limbeck[parquet]'`") from None
    except Exception as error:  # readers raise a dozen kinds, all about the file
        raise UserError(f"{file} is not a readable Parquet file: {error}", "restore the file; it may be truncated") from None
    return _source(frame, file, label, columns)
