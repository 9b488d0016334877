"""Columns of an interactions table -> ids, ratings and Unix seconds; errors name the row."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cm3.common.errors import UserError
from cm3.datasets.files.tabular import Columns
from cm3.datasets.files.times import LAST, in_milliseconds, seconds_of, seconds_of_dates

_DATES = (pa.timestamp("us"), pa.timestamp("us", tz="UTC"))


def parse_ids(table: Columns, column: str) -> pa.ChunkedArray:
    """Return (N,) ids as text.

    Raises:
        UserError: an id is empty, or the column is neither text nor integer.
    """
    values = table.values[column]
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        elif not pa.types.is_integer(values.type):
            raise UserError(f"{table.path}: column {column!r} is of type {values.type}; ids must be text or integers")
        values = values.cast(pa.string())
    empty = pc.or_kleene(pc.is_null(values), pc.equal(values, "")).to_numpy().astype(bool)
    _check(table, column, empty, values, "is empty; every interaction needs a user and an item")
    return values


def parse_ratings(table: Columns, column: str) -> np.ndarray:
    """Return (N,) float32 ratings. Raises UserError if one is not a finite number."""
    values = table.values[column]
    numbers = _numbers(values)
    _check(table, column, ~np.isfinite(numbers), values, "is not a finite number; fix the row or remove it")
    return numbers.astype(np.float32)


class Times:
    """Parser of Unix seconds, Unix milliseconds, dates such as 20200916, and ISO dates and times (UTC by default).

    All parts of a table must have the same form.
    """

    def __init__(self) -> None:
        self.unit = ""
        self.dates: pa.DataType | None = None

    def parse(self, table: Columns, column: str) -> np.ndarray:
        """Return (N,) int64 Unix seconds of a part of the table.

        Raises:
            UserError: a value is none of these, is after 2099 or, as a number, before 1970; or the column mixes forms.
        """
        values = table.values[column]
        if self.dates or (not self.unit and (pa.types.is_temporal(values.type) or not _looks_numeric(values))):
            return self._dates(table, column)
        numbers = _numbers(values)
        _check(table, column, ~np.isfinite(numbers), values, "is not a time; give Unix seconds, milliseconds or dates")
        known, many = numbers != 0, in_milliseconds(numbers)
        if not self.unit and known.any():
            dates = seconds_of_dates(numbers)[0][known].all()
            self.unit = "milliseconds" if many.any() else "dates" if dates else "seconds"
        if self.unit == "dates":
            days, midnight = seconds_of_dates(numbers)
            _check(table, column, known & ~days, values, "is not a date in a column of dates like 20200916")
            return np.where(known, midnight, 0)
        if self.unit == "seconds":
            _check(table, column, many, values, "looks like milliseconds in a column of Unix seconds")
        elif self.unit == "milliseconds":
            _check(table, column, known & ~many, values, "looks like Unix seconds in a column of milliseconds")
        last = LAST * 1000 if self.unit == "milliseconds" else LAST
        _check(
            table,
            column,
            (numbers < 0) | (numbers > last),
            values,
            "is not between 1970 and 2099; give Unix seconds, milliseconds or dates like 2020-09-16",
        )
        return seconds_of(numbers)

    def _dates(self, table: Columns, column: str) -> np.ndarray:
        values = table.values[column]
        for kind in (self.dates,) if self.dates else _DATES:
            try:
                stamps = values.cast(options=pc.CastOptions(kind, allow_time_truncate=True))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                continue
            _check(table, column, pc.is_null(stamps).to_numpy().astype(bool), values, "is empty; a time is needed")
            seconds = stamps.cast(pa.int64()).to_numpy() // 1_000_000
            _check(table, column, seconds > LAST, values, "is after 2099; fix the row or remove it")
            self.dates = kind
            found: np.ndarray = seconds
            return found
        _check(
            table,
            column,
            np.asarray([not _is_date(v) for v in values.to_pylist()]),
            values,
            "is not a time; give Unix seconds, milliseconds or dates like 2020-09-16",
        )
        raise UserError(f"{table.path}: column {column!r} mixes times with and without time zone; use one form")


def _is_date(value: Any) -> bool:
    for kind in _DATES:
        try:
            return value not in (None, "") and pa.array([value]).cast(kind).null_count == 0
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
    return False


def _looks_numeric(values: pa.ChunkedArray) -> bool:
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return True
    return bool(np.isfinite(_number(values[0].as_py())))


def _numbers(values: pa.ChunkedArray) -> np.ndarray:
    try:
        found: np.ndarray = values.cast(pa.float64()).to_numpy().astype(np.float64)
        return found
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return np.asarray([_number(v) for v in values.to_pylist()], dtype=np.float64)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _check(table: Columns, column: str, bad: np.ndarray, values: pa.ChunkedArray, complaint: str) -> None:
    rows = np.flatnonzero(bad)
    if len(rows):
        row = int(rows[0])
        more = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
        raise UserError(f"{table.place(row)}: {column} = {values[row].as_py()!r} {complaint}{more}")
