"""Vectors in Parquet files: a column of ids and a column of lists of numbers, of any list and number type."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cm3.common.errors import UserError
from cm3.common.ids import id_column, missing_id
from cm3.common.input_files import parts_of
from cm3.common.strict import nearest
from cm3.common.tables import FAILED, MISSING, OK
from cm3.common.values import InvalidValueError, first_valid, is_list, python_value, shown, without_views

_ROWS = 1024


def read_vectors(path: Path, id_column_name: str, vector_column: str) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """Yield chunks of ids (binary: their UTF-8 bytes) and their (n, d) float32 vectors; rows without a vector are skipped.

    Args:
        path: a file, or a folder of parts.
        id_column_name, vector_column: names of the columns.

    Raises:
        UserError: with the row and column: the file is unreadable, a column is missing or of another type, an id is
            missing or invalid, or a vector is empty, of another length, or holds a null or a number beyond float32.
    """
    dim = None
    for part in parts_of(path):
        try:
            with pq.ParquetFile(part) as file:
                for ids, values in _read(part, file, id_column_name, vector_column, dim):
                    dim = values.shape[1]
                    yield ids, values
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{part}: not a readable Parquet file ({error})") from error


def _read(
    path: Path, file: pq.ParquetFile, ids: str, vectors: str, dim: int | None
) -> Iterator[tuple[pa.Array, np.ndarray]]:
    names = file.schema_arrow.names
    for column in (ids, vectors):
        if column not in names:
            raise UserError(f"{path}: has no column {column!r}{nearest(column, names)}; set id_column, vector_column")
        if names.count(column) > 1:
            raise UserError(f"{path}: duplicate column {column!r}; rename one of them")
    # A features file of this pipeline holds zeros for items that had no input.
    state = ["status"] if _has_statuses(file) else []
    first = 0
    for batch in file.iter_batches(_ROWS, columns=[ids, vectors, *state]):
        there = batch.column(vectors).is_valid()
        if state:
            there = pc.and_(there, pc.equal(batch.column("status").cast(pa.string()), OK))
        part = _Part(path, batch, first + np.flatnonzero(there.to_numpy(zero_copy_only=False)), there)
        values = part.vectors(vectors, dim)
        if len(values):
            dim = values.shape[1]
            yield part.ids(ids), values
        first += len(batch)


class _Part:
    """The rows of a batch that have a vector; errors name the row of the file."""

    def __init__(self, path: Path, batch: pa.RecordBatch, rows: np.ndarray, there: pa.Array) -> None:
        self.path, self.rows = path, rows
        self._batch, self._there = batch, there

    def ids(self, column: str) -> pa.Array:
        """Return (n,) ids as UTF-8 bytes."""
        values = self._column(column)
        try:
            ids, missing = id_column(values)
        except InvalidValueError as error:
            raise self._error(error.row, column, error.value, error.reason) from None
        if missing.any():
            row = int(np.flatnonzero(missing)[0])
            value = python_value(values, row)
            raise self._error(row, column, value, f"{missing_id(value)}; every vector needs an item id")
        return ids.cast(pa.binary()).combine_chunks()

    def vectors(self, column: str, dim: int | None) -> np.ndarray:
        """Return (n, d) float32 vectors; `dim` is d of the rows before, if there are any."""
        values = self._column(column)
        lists = values.combine_chunks() if is_list(values.type) else None
        if lists is None or not _is_number(lists.type.value_type):
            kind = self._batch.schema.field(column).type
            row = first_valid(values)
            if row is None:
                raise UserError(f"{self.path}: column {column!r} is of type {kind}, not a list of numbers")
            raise self._error(row, column, python_value(values, row), f"is of type {kind}, not a list of numbers")
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
        if not len(lengths):
            return np.empty((0, 0), np.float32)
        dim = int(lengths[0]) if dim is None else dim
        for row in np.flatnonzero((lengths != dim) | (lengths == 0))[:1]:
            length = f"has {lengths[row]} numbers, those before it {dim}" if lengths[row] else "is an empty vector"
            raise self._error(int(row), column, lists[int(row)].as_py(), length)
        flat = lists.flatten()
        for place in np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[:1]:
            row = int(place) // dim
            raise self._error(row, column, lists[row].as_py(), "holds a null; give all numbers, or null for the vector")
        numbers = flat.to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, dim)
        row = beyond_float32(numbers)
        if row is not None:
            raise self._error(row, column, lists[row].as_py(), "holds a number beyond float32; scale the vectors")
        found: np.ndarray = numbers.astype(np.float32)
        return found

    def _column(self, name: str) -> pa.ChunkedArray:
        # Arrow filters no views.
        return without_views(pa.chunked_array([self._batch.column(name)])).filter(self._there)

    def _error(self, row: int, column: str, value: Any, reason: str) -> UserError:
        return UserError(f"{self.path}, row {self.rows[row]}: {column} = {shown(value)} {reason}")


def beyond_float32(vectors: np.ndarray) -> int | None:
    """Return the first of (n, d) vectors that float32 turns from finite into infinite, None if there is none."""
    if vectors.dtype.kind != "f" or vectors.dtype.itemsize <= 4:
        return None
    rows = np.flatnonzero((np.isfinite(vectors) & (np.abs(vectors) > np.finfo(np.float32).max)).any(axis=1))
    return int(rows[0]) if len(rows) else None


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_null(kind)
    )


def _has_statuses(file: pq.ParquetFile) -> bool:
    """Return whether a column `status` holds ok, missing and failed, as in this pipeline, not other words such as sold."""
    field = file.schema_arrow.field("status") if file.schema_arrow.names.count("status") == 1 else None
    kind = None if field is None else field.type
    kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
    if kind not in (pa.string(), pa.large_string()):
        return False
    found: set[str | None] = set()
    for batch in file.iter_batches(columns=["status"]):
        found.update(batch.column("status").cast(pa.string()).unique().to_pylist())
    found.discard(None)
    return bool(found) and found <= {OK, MISSING, FAILED}
