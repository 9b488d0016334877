"""Columns and values of files from other programs: one Arrow type for each kind of text, and short excerpts of values."""

from typing import Any

import numpy as np
import pyarrow as pa

_SHOWN = 80
_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


class InvalidValueError(ValueError):
    """A value of a column that cannot be read.

    Attributes:
        row: its position in the column.
        value: the value, as a Python object.
        reason: what is wrong with it and what to do, to follow "column = value" in a message.
    """

    def __init__(self, row: int, value: Any, reason: str) -> None:
        self.row, self.value, self.reason = row, value, reason
        super().__init__(f"{shown(value)} {reason}")


def shown(value: Any) -> str:
    """Return the Python literal of a value for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def without_views(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column with views (of text, bytes or lists) and tensors as the types that all functions of Arrow take."""
    kind = values.type
    if isinstance(kind, pa.FixedShapeTensorType):
        storage = [chunk.storage for chunk in values.chunks]
        return pa.chunked_array(storage, kind.storage_type)
    if pa.types.is_string_view(kind):
        return values.cast(pa.string())
    if pa.types.is_binary_view(kind):
        return values.cast(pa.binary())
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        # Not a cast, which returns an empty last list (pyarrow 26).
        return pa.chunked_array([pa.array(values.to_pylist(), pa.large_list(kind.value_type))])
    return values


def plain_column(values: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column without encodings: dictionaries, views and extension types as their values, binary as UTF-8 text.

    Raises:
        InvalidValueError: binary data, or what a file marks as text, are not UTF-8.
    """
    if isinstance(values, pa.Array):
        values = pa.chunked_array([values])
    kind = values.type
    if isinstance(kind, pa.BaseExtensionType):
        storage = [chunk.storage for chunk in values.chunks]
        return plain_column(pa.chunked_array(storage, kind.storage_type))
    if pa.types.is_dictionary(kind):
        return plain_column(values.cast(kind.value_type))
    if pa.types.is_string_view(kind):
        return plain_column(without_views(values))
    if is_binary(kind):
        return _decoded(values)
    # Arrow does not check text when it reads a file.
    return _decoded(values.cast(_BYTES[kind])) if is_text(kind) else values


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type, after `plain_column`, holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_binary(kind: pa.DataType) -> bool:
    """Return whether a column holds bytes: text without a mark, as Spark and Impala write it, or data such as images."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column of this type, after `without_views`, holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def python_value(values: pa.ChunkedArray, row: int) -> Any:
    """Return a value of a column; where Python has no such value, its text."""
    try:
        return values[row].as_py()
    except (ValueError, OverflowError):  # nanoseconds, years after 9999
        return str(values[row].cast(pa.string()))


def first_valid(values: pa.ChunkedArray) -> int | None:
    """Return the position of the first value that is not null, None if there is none."""
    rows = np.flatnonzero(values.is_valid().to_numpy())
    return int(rows[0]) if len(rows) else None


def _decoded(values: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = pa.large_binary() if pa.types.is_large_binary(values.type) else pa.binary()
    try:
        return values.cast(kind).cast(pa.large_string() if kind == pa.large_binary() else pa.string())
    except pa.ArrowInvalid:
        for row, value in enumerate(values.to_pylist()):
            try:
                value and value.decode()
            except UnicodeDecodeError:
                raise InvalidValueError(row, value, "is binary data, not UTF-8 text; store it as text") from None
        raise
