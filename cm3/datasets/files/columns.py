"""Columns of an interactions table -> ids, ratings and Unix seconds; errors name the row."""

import contextlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cm3.common.errors import UserError
from cm3.common.ids import MISSING_TEXTS, id_column, missing_id
from cm3.common.values import InvalidValueError, is_text, plain_column, python_value, shown
from cm3.datasets.files.tabular import Columns
from cm3.datasets.times import Times, as_numbers


def parse_ids(
    table: Columns, column: str, row: str = "interaction", needs: str = "a user and an item"
) -> pa.ChunkedArray:
    """Return (N,) ids as text; `row` says in messages what a row is, and `needs` what it must have.

    Raises:
        UserError: an id is missing, or is neither text nor a whole number.
    """
    values = table.values[column]
    with _naming(table, column):
        ids, missing = id_column(values)
    reason = missing_id(python_value(values, int(np.flatnonzero(missing)[0]))) if missing.any() else ""
    _check(table, column, missing, values, f"{reason}; every {row} needs {needs}")
    return ids


_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d+,\d+\s*")


def parse_ratings(table: Columns, column: str, decimal: str = ".") -> np.ndarray:
    """Return (N,) float32 ratings; `decimal` is their decimal mark. Raises UserError if one is not a finite number."""
    with _naming(table, column):
        values = plain_column(table.values[column])
    with np.errstate(over="ignore"):
        numbers = as_numbers(_with_points(values) if decimal == "," else values).astype(np.float32)
    bad = ~np.isfinite(numbers)
    advice = "fix the row or remove it"
    if bad.any() and _DECIMAL_COMMA.fullmatch(str(python_value(values, int(np.flatnonzero(bad)[0])))):
        advice = "if it is written with a decimal comma, set decimal: ',' next to path"
    _check(table, column, bad, values, f"is not a finite number; {advice}")
    return numbers


_LABELS = {
    **dict.fromkeys(("train", "training", "0"), 0),
    **dict.fromkeys(("valid", "validation", "val", "dev", "1"), 1),
    **dict.fromkeys(("test", "testing", "2"), 2),
}


def parse_splits(table: Columns, column: str) -> pa.Array:
    """Return (N,) int8 labels of the user's own split: 0 train, 1 valid, 2 test. Raises UserError for another word."""
    texts = _texts(table, column)
    labels = np.array([_LABELS.get(text.strip().lower(), -1) for text in texts], np.int8)
    advice = "is not a split; write train, valid or test in every row"
    _check(table, column, labels < 0, table.values[column], advice)
    return pa.array(labels)


def parse_labels(table: Columns, column: str) -> pa.ChunkedArray:
    """Return (N,) text of numbers, truth values and text without white space around it; null where there is none.

    Raises:
        UserError: another type, such as a list or a date, or an infinite number.
    """
    with _naming(table, column):
        values = plain_column(table.values[column])
    kind = values.type
    if pa.types.is_floating(kind):
        values = values.cast(pa.float32()) if pa.types.is_float16(kind) else values
        infinite = pc.fill_null(pc.is_inf(values), False).to_numpy().astype(bool)
        _check(table, column, infinite, values, "is not a finite number; fix the row or leave the cell empty")
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    elif not (is_text(kind) or pa.types.is_null(kind)):
        simple = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)
        wrong = np.zeros(len(values), bool) if simple else values.is_valid().to_numpy().astype(bool)
        advice = "where text or a number is expected; store one in a column of its own, of a date the year"
        _check(table, column, wrong, values, f"is of type {kind}, {advice}")
    texts = pc.utf8_trim_whitespace(values.cast(pa.string()))
    if table.format == "jsonl":
        nested = pc.fill_null(pc.match_substring_regex(texts, r"^[\[{]"), False).to_numpy().astype(bool)
        _check(table, column, nested, texts, "is a list or an object, where text or a number is expected")
    missing = pc.is_in(texts, value_set=pa.array(["", *MISSING_TEXTS]))
    return pc.if_else(missing, pa.scalar(None, pa.string()), texts)


def has_event(table: Columns, column: str, events: Sequence[str]) -> np.ndarray:
    """Return which rows are of one of the kinds `events`, (N,) bool."""
    wanted = set(events)
    return np.array([text in wanted for text in _texts(table, column)], bool)


def _texts(table: Columns, column: str) -> list[str]:
    return ["" if value is None else str(value) for value in table.values[column].to_pylist()]


def _with_points(values: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.replace_substring(values, ",", ".") if is_text(values.type) else values


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
