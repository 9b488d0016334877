"""Columns of an interactions table -> ids, ratings and Unix seconds; errors name the row."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from cm3.common.errors import UserError
from cm3.common.ids import id_column, missing_id
from cm3.common.values import InvalidValueError, plain_column, python_value, shown
from cm3.datasets.files.tabular import Columns
from cm3.datasets.times import Times, as_numbers


def parse_ids(table: Columns, column: str, row: str = "interaction") -> pa.ChunkedArray:
    """Return (N,) ids as text; `row` says in messages what a row is.

    Raises:
        UserError: an id is missing, or is neither text nor a whole number.
    """
    values = table.values[column]
    with _naming(table, column):
        ids, missing = id_column(values)
    reason = missing_id(python_value(values, int(np.flatnonzero(missing)[0]))) if missing.any() else ""
    _check(table, column, missing, values, f"{reason}; every {row} needs a user and an item")
    return ids


def parse_ratings(table: Columns, column: str) -> np.ndarray:
    """Return (N,) float32 ratings. Raises UserError if one is not a finite number."""
    with _naming(table, column):
        values = plain_column(table.values[column])
    with np.errstate(over="ignore"):
        numbers = as_numbers(values).astype(np.float32)
    _check(table, column, ~np.isfinite(numbers), values, "is not a finite number; fix the row or remove it")
    return numbers


def parse_numbers(table: Columns, column: str) -> np.ndarray:
    """Return (N,) float64 numbers. Raises UserError if one is not finite."""
    with _naming(table, column):
        values = plain_column(table.values[column])
    numbers = as_numbers(values)
    _check(table, column, ~np.isfinite(numbers), values, "is not a finite number; fix the row or remove it")
    return numbers


def parse_times(table: Columns, column: str, times: Times) -> np.ndarray:
    """Return (N,) int64 Unix seconds of a part of the table; `times` has parsed the parts before it.

    Raises:
        UserError: a value is not a time, or is not of the form of those before it.
    """
    values = table.values[column]
    with _naming(table, column):
        return times.parse(values, lambda bad, complaint: _check(table, column, bad, values, complaint))


@contextlib.contextmanager
def _naming(table: Columns, column: str) -> Iterator[None]:
    try:
        yield
    except InvalidValueError as error:
        raise UserError(f"{table.place(error.row)}: {column} = {shown(error.value)} {error.reason}") from None


def _check(table: Columns, column: str, bad: np.ndarray, values: pa.ChunkedArray, complaint: str) -> None:
    rows = np.flatnonzero(bad)
    if len(rows):
        row = int(rows[0])
        more = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
        raise UserError(f"{table.place(row)}: {column} = {shown(python_value(values, row))} {complaint}{more}")
