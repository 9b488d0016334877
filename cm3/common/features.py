"""Feature files: one vector and a status per item, in the order of the item table."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cm3.common.arrays import rows_not_finite, zeros
from cm3.common.errors import UserError
from cm3.common.files import atomic
from cm3.common.tables import (
    CATEGORY,
    OK,
    ROW_GROUP,
    describe_columns,
    encode_metadata,
    metadata_of,
    open_parquet,
    parquet_writer,
)


@dataclass(frozen=True)
class Features:
    """One modality's vectors: row i belongs to item i.

    Attributes:
        item_ids: N item ids.
        embedding: (N, d) float32; rows whose status is not ok are zero.
        status: N strings: ok, missing or failed.
        metadata: provenance: extractor spec, model, revision or weights' digest, versions, ...
    """

    item_ids: list[str]
    embedding: np.ndarray
    status: np.ndarray
    metadata: dict[str, Any]

    @property
    def ok(self) -> np.ndarray:
        """(N,) bool: which rows hold a real vector."""
        found: np.ndarray = self.status == OK
        return found


def features_file(modality: str, extractor: str, key: str, control: str = "", reduction: str = "") -> str:
    """Return the path of a features file in the folder of its data set.

    Args:
        modality: what the extractor reads: text, image, ...
        extractor: its name.
        key: of its settings.
        control: of the control that replaces the features, empty for the features themselves.
        reduction: `cm3.common.reduction.Reduction.suffix`, empty for the features that the extractor gives.
    """
    return f"features/{modality}/{'-'.join(filter(None, (extractor, key, reduction, control)))}.parquet"


def graph_file(features: str, knn_k: int, method: str, missing: str) -> str:
    """Return the path of an item graph in the folder of its data set; settings other than the defaults end its name.

    Args:
        features: name of the features file, without its suffix.
        knn_k, method, missing: settings of the model.
    """
    parts = [method] if method != "exact" else []
    parts += [missing] if missing != "drop" else []
    return f"similarity/{'-'.join([features, f'k{knn_k}', *parts])}.parquet"


def features_schema(dim: int, dtype: str) -> pa.Schema:
    """Return the schema of a features file: item_id, embedding fixed_size_list<dtype>[dim] not null, status."""
    value = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    item = pa.field("item", value, nullable=False)
    return pa.schema(
        [
            pa.field("item_id", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(item, dim), nullable=False),
            pa.field("status", CATEGORY, nullable=False),
        ]
    )


def write_features(
    path: str | os.PathLike[str],
    item_ids: Sequence[str],
    embedding: np.ndarray,
    status: Sequence[str],
    metadata: dict[str, Any],
    dtype: str = "float32",
) -> None:
    """Write (N, d) vectors of N items, atomically. Rows that are not ok are stored as zeros.

    Vectors are not compressed, which costs two fifths of the time of writing, half of that of reading, and saves a sixth of
    the space.

    Raises:
        UserError: an ok row holds NaN or infinity, or overflows float16; the first such items are named.
        ValueError: lengths differ.
    """
    state = np.asarray(status, dtype=object)
    if not (len(item_ids) == len(embedding) == len(state)):
        raise ValueError(f"{path}: {len(item_ids)} ids, {len(embedding)} vectors, {len(state)} statuses")
    with np.errstate(over="ignore"):  # an overflow to float16 gives infinity, which is refused below
        values = np.ascontiguousarray(embedding, dtype=dtype)
    bad = np.flatnonzero((state == OK) & rows_not_finite(values))
    if len(bad):
        names = ", ".join(item_ids[i] for i in bad[:5])
        raise UserError(f"{path}: {len(bad)} vectors hold NaN or infinity in {dtype}, first for items {names}")
    if values[state != OK].any():
        values = values.copy()  # the caller's array is not changed
        values[state != OK] = 0
    schema = features_schema(values.shape[1], dtype)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=schema.field("embedding").type)
    arrays = [
        pa.array(item_ids, pa.string()),
        vectors,
        pa.array(state.tolist(), pa.string()).dictionary_encode().cast(CATEGORY),
    ]
    table = pa.table(arrays, schema=schema.with_metadata(encode_metadata(metadata)))
    options = {
        "compression": {"item_id": "zstd", "status": "zstd", "embedding.list.element": "none"},
        "use_dictionary": ["item_id", "status"],
        "write_statistics": ["item_id"],
    }
    with atomic(path) as temporary, parquet_writer(temporary, table.schema, **options) as writer:
        writer.write_table(table, row_group_size=ROW_GROUP)


def read_features(path: str | os.PathLike[str], item_ids: Sequence[str] | None = None) -> Features:
    """Read a features file a row group at a time; with `item_ids`, check that row i belongs to item i.

    Vectors that do not fit into memory are in a temporary file (`cm3.common.arrays.zeros`).

    Raises:
        DamagedFileError: as `cm3.common.tables.open_parquet`.
        UserError: absent, wrong columns, null vectors, ids in another order, or NaN in an ok row.
    """
    with open_parquet(path) as file:
        schema = file.schema_arrow
        if schema.names != ["item_id", "embedding", "status"] or not pa.types.is_fixed_size_list(
            schema.field("embedding").type
        ):
            raise UserError(f"{path}: not a features file; its columns are {describe_columns(schema)}")
        names = file.read(["item_id", "status"])
        embedding = zeros((file.metadata.num_rows, schema.field("embedding").type.list_size))
        nulls = start = 0
        for batch in file.iter_batches(ROW_GROUP, columns=["embedding"]):
            column = batch.column(0)
            nulls += column.null_count
            if not nulls:
                values = column.flatten().to_numpy(zero_copy_only=True)
                embedding[start : start + len(column)] = values.reshape(len(column), -1)
            start += len(column)
    if nulls:
        raise UserError(f"{path}: {nulls} vectors are null; a row without a vector needs a status, not a null")
    ids = names.column("item_id").to_pylist()
    if item_ids is not None and list(item_ids) != ids:
        where = next(
            (i for i, (a, b) in enumerate(zip(item_ids, ids, strict=False)) if a != b), min(len(ids), len(item_ids))
        )
        raise UserError(
            f"{path}: row {where} is not item {where} of items.parquet ({len(ids)} rows, {len(item_ids)} items); delete it and run again"
        )
    status = np.asarray(names.column("status").to_pylist(), dtype=object)
    bad = np.flatnonzero((status == OK) & rows_not_finite(embedding))
    if len(bad):
        raise UserError(
            f"{path}: {len(bad)} vectors hold NaN or infinity, first for items {', '.join(ids[i] for i in bad[:5])}"
        )
    return Features(ids, embedding, status, metadata_of(path, schema))
