"""Files of user and item embeddings: an id column and one vector per row."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.errors import UserError
from stages.tables import read_metadata, write_table


def write_embeddings(
    path: str | os.PathLike[str], id_name: str, ids: Sequence[str], vectors: np.ndarray, metadata: dict[str, Any]
) -> None:
    """Write (N, D) float32 vectors with their ids as columns `id_name` and `embedding`, atomically."""
    values = np.ascontiguousarray(vectors, np.float32)
    schema = _schema(id_name, values.shape[1])
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=schema.field("embedding").type)
    write_table(path, pa.table([pa.array(ids, pa.string()), column], schema=schema), schema, metadata)


def read_embeddings(
    path: str | os.PathLike[str], id_name: str, ids: Sequence[str]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the (N, D) float32 vectors of `ids`, in their order, and the file's metadata.

    Raises:
        UserError: absent, unreadable, other columns, other ids, or values that are not finite.
    """
    try:
        table = pq.read_table(path, partitioning=None)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); delete it and train again") from error
    names = [id_name, "embedding"]
    if table.column_names != names or not pa.types.is_fixed_size_list(table.schema.field("embedding").type):
        raise UserError(
            f"{path}: has columns {table.column_names}, not {names} of fixed size; delete it and train again"
        )
    if table.column(id_name).to_pylist() != list(ids):
        raise UserError(
            f"{path}: its {len(table)} ids are not those of the data set, in order; delete it and train again"
        )
    column = table.column("embedding").combine_chunks()
    width = table.schema.field("embedding").type.list_size
    vectors = column.flatten().to_numpy(zero_copy_only=True).reshape(-1, width)
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
        raise UserError(f"{path}: the vector of {id_name} {ids[row]} holds NaN or infinity; delete it and train again")
    return vectors, read_metadata(path)


def _schema(id_name: str, width: int) -> pa.Schema:
    value = pa.list_(pa.field("item", pa.float32(), nullable=False), width)
    return pa.schema(
        [pa.field(id_name, pa.string(), nullable=False), pa.field("embedding", value, nullable=False)]
    )  # fmt: skip
