"""Times as Unix seconds: seconds, milliseconds, dates such as 20200916 or 2020-09-16, ISO dates and times."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cm3.common.values import is_text, plain_column

# Seconds are below this until the year 5138; milliseconds are above it since 1973.
_MILLISECONDS_FROM = 10**11
_FIRST, LAST = 1, 4_102_444_800
"""Unix seconds of 1970 and of 2100."""
_LARGEST = 2.0**62

_STAMPS = (pa.timestamp("us"), pa.timestamp("us", tz="UTC"))
_DATE_FACTORS = {"dates": (1, 0), "months": (100, 1), "years": (10_000, 101)}
"""Forms of dates without separators, such as 20200916, 202009 and 2020: factor and summand that make the first one."""
_EXAMPLES = {"dates": "20200916", "months": "202009", "years": "2020"}

_NOT_A_TIME = "is not a time; give Unix seconds, milliseconds or dates like 2020-09-16"

Check = Callable[[np.ndarray, str], None]
"""Raises a UserError with the complaint if any of the (N,) rows of a mask is true."""


class Times:
    """Parser of a column of times, part by part: numbers, or ISO dates and times (UTC by default).

    The first part that has known times decides on the form, and all parts must have it. 0 means unknown in every form.

    Args:
        mixed_units: accept seconds and milliseconds in one column.
    """

    def __init__(self, mixed_units: bool = False) -> None:
        self._mixed = mixed_units
        self._unit = ""
        self._stamps: pa.DataType | None = None

    def parse(self, values: pa.ChunkedArray, check: Check) -> np.ndarray:
        """Return (N,) int64 Unix seconds of a part of a column.

        Raises:
            UserError: by `check`: a value is not a time, is empty, is after 2099 or, as a number, before 1970; or the
                column mixes forms.
            InvalidValueError: binary data are not UTF-8 text.
        """
        values = plain_column(values)
        if pa.types.is_boolean(values.type) or pa.types.is_time(values.type) or pa.types.is_duration(values.type):
            check(np.ones(len(values), bool), _NOT_A_TIME)
        empty = pc.is_null(values)
        if is_text(values.type):
            empty = pc.or_kleene(empty, pc.equal(pc.utf8_trim_whitespace(values), ""))
        check(empty.to_numpy().astype(bool), "is empty; a time is needed, or 0 where it is unknown")
        if self._stamps or (not self._unit and _holds_dates(values)):
            return self._parse_stamps(values, check)
        numbers = as_numbers(values)
        check(~np.isfinite(numbers), "is not a time; give Unix seconds, milliseconds or dates")
        return self.parse_numbers(numbers, check)

    def parse_numbers(self, numbers: np.ndarray, check: Check) -> np.ndarray:
        """Return (N,) int64 Unix seconds of finite numbers.

        Raises:
            UserError: by `check`, as `parse`.
        """
        known, many = numbers != 0, in_milliseconds(numbers)
        if not self._unit and known.any():
            self._unit = _unit_of(numbers[known])
        if self._unit in _DATE_FACTORS:
            days, midnight = _dates_of(numbers, self._unit)
            example = _EXAMPLES[self._unit]
            check(known & ~days, f"is not a date in a column of {self._unit} like {example}")
            return np.where(known, midnight, 0)
        if self._unit == "seconds" and not self._mixed:
            check(many, "looks like milliseconds in a column of Unix seconds")
        elif self._unit == "milliseconds" and not self._mixed:
            check(known & ~many, "looks like Unix seconds in a column of milliseconds")
        check(
            (numbers < 0) | (numbers > np.where(many, LAST * 1000, LAST)),
            "is not between 1970 and 2099; give Unix seconds, milliseconds or dates like 2020-09-16",
        )
        return seconds_of(numbers)

    def _parse_stamps(self, values: pa.ChunkedArray, check: Check) -> np.ndarray:
        unknown = np.zeros(len(values), bool)
        if is_text(values.type):
            unknown = pc.fill_null(pc.is_in(values, pa.array(["0", "0.0"], values.type)), False).to_numpy().astype(bool)
            values = _shortened(values)
        for kind in (self._stamps,) if self._stamps else _STAMPS:
            stamps = _cast(pc.if_else(pa.array(~unknown), values, pa.scalar(None, values.type)), kind)
            if stamps is None:
                continue
            check(stamps.is_null().to_numpy().astype(bool) & ~unknown, "is empty; a time is needed")
            seconds = stamps.cast(pa.int64()).fill_null(0).to_numpy() // 1_000_000
            check(seconds > LAST, "is after 2099; fix the row or remove it")
            self._stamps = kind
            return np.where(unknown, 0, seconds)
        check(~unknown & ~_readable(values, _STAMPS), _NOT_A_TIME)
        chosen = self._stamps or next(kind for kind in _STAMPS if _readable(values, [kind])[~unknown][0])
        check(~unknown & ~_readable(values, [chosen]), "mixes times with and without time zone; use one form")
        raise AssertionError("every value is a time of one form, but the column is not")


def _unit_of(known: np.ndarray) -> str:
    if in_milliseconds(known).any():
        return "milliseconds"
    return next((form for form in _DATE_FACTORS if _dates_of(known, form)[0].all()), "seconds")


def _holds_dates(values: pa.ChunkedArray) -> bool:
    """Return whether a column has dates and times as such or as text; unknown times (0) say nothing about the others."""
    if not is_text(values.type):
        return bool(pa.types.is_temporal(values.type))
    first = next((text for chunk in values.chunks for text in chunk.to_pylist() if as_number(text) != 0), "0")
    return not np.isfinite(as_number(first))


def _shortened(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return ISO texts with at most six decimals, which is what Arrow reads; the others do not change the second."""
    return pc.replace_substring_regex(values, r"(:\d{2}\.\d{6})\d+", r"\1")


def _cast(values: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray | None:
    try:
        return values.cast(options=pc.CastOptions(kind, allow_time_truncate=True))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _readable(values: pa.ChunkedArray, kinds: Any) -> np.ndarray:
    """Return which of (N,) values can be read as timestamps of one of `kinds`, one by one."""
    return np.asarray(
        [
            values[row].is_valid and any(_cast(values.slice(row, 1), kind) is not None for kind in kinds)
            for row in range(len(values))
        ],
        dtype=bool,
    )


def as_numbers(values: pa.ChunkedArray) -> np.ndarray:
    """Return (N,) float64 numbers of a column of numbers or text; NaN for a value that is not a number."""
    if pa.types.is_nested(values.type):
        return np.full(len(values), np.nan)
    try:
        found: np.ndarray = values.cast(pa.float64(), safe=False).to_numpy().astype(np.float64)
        return found
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return np.asarray([as_number(text) for text in values.to_pylist()], dtype=np.float64)


def as_number(value: Any) -> float:
    """Return a number as float, NaN for a value that is not a number. Digits are those of ASCII, without underscores."""
    if isinstance(value, str) and ("_" in value or not value.isascii()):
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def in_milliseconds(times: np.ndarray) -> np.ndarray:
    """Return which of (N,) times are milliseconds, by their size."""
    found: np.ndarray = np.abs(times) >= _MILLISECONDS_FROM
    return found


def seconds_of(times: np.ndarray) -> np.ndarray:
    """Return (N,) int64 Unix seconds of seconds and milliseconds, distinguished by size; 0 for other values."""
    with np.errstate(invalid="ignore"):
        known = np.where(np.abs(times) < _LARGEST, times, 0)
        return np.where(in_milliseconds(known), known // 1000, known // 1).astype(np.int64)


def plausible(seconds: np.ndarray) -> np.ndarray:
    """Return which of (N,) Unix seconds are plausible: after 0, which means unknown, and before 2100."""
    return (seconds >= _FIRST) & (seconds <= LAST)


def _dates_of(numbers: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Return which of (N,) finite numbers are dates of a form of `_DATE_FACTORS`, and their Unix seconds."""
    factor, summand = _DATE_FACTORS[form]
    numbers = numbers * factor + summand
    known = (numbers >= 1900_01_01) & (numbers < 2100_01_01) & (numbers % 1 == 0)
    year, rest = np.divmod(np.where(known, numbers, 1970_01_01).astype(np.int64), 10_000)
    month, day = rest // 100, rest % 100
    first = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    date = first.astype("datetime64[D]") + (day - 1)
    known &= (month >= 1) & (month <= 12) & (date.astype("datetime64[M]") == first)
    return known, date.astype("datetime64[s]").astype(np.int64)
