"""Files of user and item embeddings: an id column and one vector per row."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cm3.common.errors import UserError
from cm3.common.tables import metadata_of, open_parquet, write_table

_BATCH_ROWS = 4096


def write_embeddings(
    path: str | os.PathLike[str], id_name: str, ids: Sequence[str], vectors: np.ndarray, metadata: dict[str, Any]
) -> None:
    """Write (N, D) float32 vectors with their ids as columns `id_name` and `embedding`, atomically.

    Without dictionaries and compression, which cost half of the time and save a tenth of the space.
    """
    values = np.ascontiguousarray(vectors, np.float32)
    schema = _schema(id_name, values.shape[1])
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=schema.field("embedding").type)
    table = pa.table([pa.array(ids, pa.string()), column], schema=schema)
    write_table(path, table, schema, metadata, compression="none", use_dictionary=False)


def read_embeddings(
    path: str | os.PathLike[str], id_name: str, ids: Sequence[str] | pa.Array, rows: np.ndarray | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the (N, D) float32 vectors of `ids`, in their order, and the file's metadata.

    The whole file is checked, a batch at a time. With `rows`, ascending (R,), only theirs are kept, (R, D).

    Raises:
        DamagedFileError: as `cm3.common.tables.open_parquet`.
        UserError: absent, other columns, other ids, or values that are not finite.
    """
    wanted = ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string())
    names = [id_name, "embedding"]
    with open_parquet(path) as file:
        schema = file.schema_arrow
        if schema.names != names or not pa.types.is_fixed_size_list(schema.field("embedding").type):
            raise UserError(f"{path}: has columns {schema.names}, not {names} of fixed size; delete it and train again")
        kept = len(wanted) if rows is None else len(rows)
        vectors = np.empty((kept, schema.field("embedding").type.list_size), np.float32)
        start = 0
        for batch in file.iter_batches(_BATCH_ROWS):
            stop = start + len(batch)
            if stop > len(wanted) or not batch.column(0).equals(wanted.slice(start, len(batch))):
                break
            some = batch.column(1).flatten().to_numpy(zero_copy_only=True).reshape(len(batch), -1)
            if not np.isfinite(some).all():
                row = start + int(np.flatnonzero(~np.isfinite(some).all(1))[0])
                raise UserError(
                    f"{path}: the vector of {id_name} {wanted[row]} holds NaN or infinity; delete it and train again"
                )
            if rows is None:
                vectors[start:stop] = some
            else:
                first, last = np.searchsorted(rows, [start, stop])
                vectors[first:last] = some[rows[first:last] - start]
            start = stop
        if start != len(wanted) or file.metadata.num_rows != len(wanted):
            raise UserError(
                f"{path}: its {file.metadata.num_rows} ids are not those of the data set, in order; delete it and "
                "train again"
            )
    return vectors, metadata_of(path, schema)


def _schema(id_name: str, width: int) -> pa.Schema:
    value = pa.list_(pa.field("item", pa.float32(), nullable=False), width)
    return pa.schema([pa.field(id_name, pa.string(), nullable=False), pa.field("embedding", value, nullable=False)])
