"""Ids of users and items as text, from values of any type: text, integers and whole floats.

A missing value (null, NaN, NaT, an empty cell, or the text that programs write for one, such as `nan`) is never an id.
"""

import math
import re
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cm3.common.values import InvalidValueError, first_valid, is_text, plain_column, python_value

MISSING_TEXTS = ("nan", "NaN", "NaT", "None", "null", "NULL", "<NA>")
"""Texts of missing values, as pandas, Python and databases write them."""

LONE_SURROGATE = "has half of a character, as in a truncated text; fix the row"
_EXACT = 2**53
_KINDS = "ids must be text or integers"
_NOT_WHOLE = f"is not a whole number below 2^53; {_KINDS}"


def id_column(values: pa.Array | pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Return (N,) ids as text, and which of them are missing.

    Raises:
        InvalidValueError: a value is neither text nor a whole number, or its column is of another type.
    """
    if pa.types.is_null(values.type):
        return pa.chunked_array([pa.nulls(len(values), pa.string())]), np.ones(len(values), bool)
    if _is_uuid(values.type):
        return _from_python(values)
    values = plain_column(values)
    kind = values.type
    if is_text(kind):
        return _from_text(values.cast(pa.string()))
    if pa.types.is_integer(kind):
        return values.cast(pa.string()), values.is_null().to_numpy().astype(bool)
    if pa.types.is_floating(kind):
        return _from_floats(values)
    if not pa.types.is_decimal(kind):
        row = first_valid(values)
        if row is not None:
            raise InvalidValueError(row, python_value(values, row), f"is of type {kind}; {_KINDS}")
    return _from_python(values)


def id_text(value: Any) -> str | None:
    """Return an id as text, None for a missing value.

    Raises:
        ValueError: with the reason, such as "is not a whole number": the value is not an id.
    """
    if isinstance(value, str):
        return _checked(value)
    if value is None:
        return None
    if isinstance(value, bool | np.bool_):
        raise ValueError(f"is a truth value; {_KINDS}")
    if isinstance(value, int | np.integer | UUID):
        return str(value)
    if isinstance(value, float | np.floating):
        return _from_float(float(value))
    if isinstance(value, bytes):
        return _from_bytes(value)
    if isinstance(value, Decimal):
        return _from_decimal(value)
    if str(value) in MISSING_TEXTS:  # NA and NaT of pandas and NumPy
        return None
    kinds: dict[type, str] = {dict: "an object", list: "a list", tuple: "a list"}
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    raise ValueError(f"is {kind}; {_KINDS}")


def is_index(column: str) -> bool:
    """Return whether a column of a text file is the row index that pandas writes, which has no name of its own."""
    return re.fullmatch(r"|Unnamed: \d+|__index_level_\d+__", column) is not None


def missing_id(value: Any) -> str:
    """Return the complaint about a missing id, to follow "column = value" in a message."""
    if value is None or not str(value).strip():
        return "is empty"
    return "is the text of a missing value" if isinstance(value, str) else "is a missing value"


def _checked(text: str) -> str | None:
    if not text.strip() or text in MISSING_TEXTS:
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(LONE_SURROGATE) from None
    return str(text)


def _from_float(number: float) -> str | None:
    if math.isnan(number):
        return None
    if not (abs(number) < _EXACT and number.is_integer()):
        raise ValueError(_NOT_WHOLE)
    return str(int(number))


def _from_bytes(value: bytes) -> str | None:
    try:
        return _checked(value.decode())
    except UnicodeDecodeError:
        raise ValueError(f"is binary data, not UTF-8 text; {_KINDS}") from None


def _from_decimal(value: Decimal) -> str | None:
    if value.is_nan():
        return None
    if value.is_infinite() or value != value.to_integral_value():
        raise ValueError(f"is not a whole number; {_KINDS}")
    return str(int(value))


def _from_text(values: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    missing = pc.or_kleene(
        pc.is_null(values),
        pc.or_(pc.equal(pc.utf8_trim_whitespace(values), ""), pc.is_in(values, pa.array(MISSING_TEXTS))),
    )
    return values, missing.to_numpy().astype(bool)


def _from_floats(values: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    numbers = values.cast(pa.float64()).to_numpy()
    exact = {pa.float16(): 2**11, pa.float32(): 2**24}.get(values.type, _EXACT)
    missing = np.isnan(numbers)
    with np.errstate(invalid="ignore"):
        wrong = ~missing & ~((np.abs(numbers) < exact) & (numbers % 1 == 0))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise InvalidValueError(row, float(numbers[row]), _NOT_WHOLE.replace("53", str(exact.bit_length() - 1)))
    whole = pa.array(np.where(missing, 0, numbers).astype(np.int64), mask=missing)
    return pa.chunked_array([whole.cast(pa.string())]), missing


def _from_python(values: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    found: list[str | None] = []
    for row, value in enumerate(values.to_pylist()):
        try:
            found.append(id_text(value))
        except ValueError as error:
            raise InvalidValueError(row, value, str(error)) from None
    missing = np.asarray([text is None for text in found], dtype=bool)
    return pa.chunked_array([pa.array(found, pa.string())]), missing


def _is_uuid(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.uuid"
