"""The Arrow schemas that stages hand each other, and checked reading and writing of them."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cm3.common.arrays import rows_not_finite, zeros
from cm3.common.errors import UserError
from cm3.common.files import atomic

OK, MISSING, FAILED = "ok", "missing", "failed"
SPLITS = ("train", "valid", "test")
ROW_GROUP = 8192

_CATEGORY = pa.dictionary(pa.int8(), pa.string())

INTERACTIONS = pa.schema(
    [
        ("user", pa.int32()),
        ("item", pa.int32()),
        ("rating", pa.float32()),
        ("timestamp", pa.int64()),  # Unix seconds
        ("split", _CATEGORY),  # train, valid or test
    ]
)
ITEMS = pa.schema(
    [
        ("item", pa.int32()),  # dense, 0-based, equal to the row number
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("brand", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("description", pa.string()),
        ("features", pa.list_(pa.string())),  # selling points, one a string
        ("details", pa.list_(pa.string())),  # "name: value"
        ("price", pa.float32()),  # null where unknown
        ("sales_rank", pa.int32()),  # 1 is the best seller of its main category; null where unknown
        ("image_urls", pa.list_(pa.string())),  # candidates, best first
    ]
)
USERS = pa.schema([("user", pa.int32()), ("user_id", pa.string())])
MANIFEST = pa.schema(
    [
        ("item_id", pa.string()),
        ("status", _CATEGORY),  # ok, missing or failed
        ("error", pa.string()),  # the reason when not ok
        ("url", pa.string()),  # where the image came from: a URL or a path
        ("sha256", pa.string()),  # of the original bytes
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),  # Pillow's name: JPEG, PNG, ...
        ("shard", pa.int32()),  # images/shard-{shard:05d}.parquet
        ("row", pa.int32()),  # row in that shard
    ]
)
IMAGES = pa.schema([("sha256", pa.string()), ("bytes", pa.binary())])
CAPTIONS = pa.schema(
    [
        ("item_id", pa.string()),
        ("caption", pa.string()),
        ("status", _CATEGORY),
        ("error", pa.string()),
        ("tokens", pa.int32()),  # generated tokens
    ]
)
RECOMMENDATIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("rank", pa.int32()),  # 1 is the best
        ("score", pa.float32()),
    ]
)
SIMILARITY = pa.schema([("item", pa.int32()), ("neighbour", pa.int32()), ("score", pa.float32())])


def write_table(
    path: str | os.PathLike[str], table: pa.Table, schema: pa.Schema, metadata: dict[str, Any] | None = None
) -> None:
    """Write `table` as Parquet (zstd) under exactly `schema`, atomically.

    `metadata` values are stored as JSON in the schema's metadata (read them with `read_metadata`).

    Raises:
        ValueError: the table's columns are not those of the schema.
    """
    write_tables(path, [table], schema, metadata)


def write_tables(
    path: str | os.PathLike[str], tables: Iterable[pa.Table], schema: pa.Schema, metadata: dict[str, Any] | None = None
) -> None:
    """Write tables one after the other as `write_table` does one: no more than one is in memory."""
    described = schema.with_metadata(_encode(metadata))
    with atomic(path) as temporary, pq.ParquetWriter(temporary, described, compression="zstd") as writer:
        for table in tables:
            if table.column_names != schema.names:
                raise ValueError(f"{path}: columns {table.column_names} are not {schema.names}")
            writer.write_table(table.cast(described), row_group_size=ROW_GROUP * 16)


def read_table(path: str | os.PathLike[str], schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet table, or some of its columns, and check it against its contract.

    Raises:
        UserError: the file is absent, unreadable, or has other columns or types than `schema`.
    """
    with _reading(path), pq.ParquetFile(path) as file:
        found = file.schema_arrow.remove_metadata()
        if not found.equals(schema):
            raise UserError(
                f"{path}: has columns {_brief(found)}, but {_brief(schema)} are expected; delete it and run again"
            )
        return file.read(None if columns is None else list(columns))


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); delete it and run again") from error


def _brief(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _encode(metadata: dict[str, Any] | None) -> dict[bytes, bytes]:
    return {k.encode(): json.dumps(v, sort_keys=True).encode() for k, v in (metadata or {}).items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON metadata that `write_table` or `write_features` stored in a Parquet file's schema."""
    stored = pq.read_schema(path).metadata or {}
    return {k.decode(): json.loads(v) for k, v in stored.items() if not k.startswith(b"ARROW:")}


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


def features_schema(dim: int, dtype: str) -> pa.Schema:
    """Return the schema of a features file: item_id, embedding fixed_size_list<dtype>[dim] not null, status."""
    value = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    item = pa.field("item", value, nullable=False)
    return pa.schema(
        [
            pa.field("item_id", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(item, dim), nullable=False),
            pa.field("status", _CATEGORY, nullable=False),
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

    Raises:
        UserError: an ok row holds NaN or infinity, or overflows float16; the first such items are named.
        ValueError: lengths differ.
    """
    state = np.asarray(status, dtype=object)
    if not (len(item_ids) == len(embedding) == len(state)):
        raise ValueError(f"{path}: {len(item_ids)} ids, {len(embedding)} vectors, {len(state)} statuses")
    with np.errstate(over="ignore"):  # an overflow to float16 is infinite, and refused below
        values = np.ascontiguousarray(embedding, dtype=dtype)
    bad = np.flatnonzero((state == OK) & rows_not_finite(values))
    if len(bad):
        names = ", ".join(item_ids[i] for i in bad[:5])
        raise UserError(f"{path}: {len(bad)} vectors hold NaN or infinity in {dtype}, first for items {names}")
    if values[state != OK].any():
        values = values.copy()  # the caller's own array stays as it is
        values[state != OK] = 0
    schema = features_schema(values.shape[1], dtype)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=schema.field("embedding").type)
    arrays = [
        pa.array(item_ids, pa.string()),
        vectors,
        pa.array(state.tolist(), pa.string()).dictionary_encode().cast(_CATEGORY),
    ]
    table = pa.table(arrays, schema=schema.with_metadata(_encode(metadata)))
    with atomic(path) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            use_dictionary=["item_id", "status"],
            write_statistics=["item_id"],
            use_byte_stream_split=["embedding.list.element"],
            row_group_size=ROW_GROUP,
        )


def read_features(path: str | os.PathLike[str], item_ids: Sequence[str] | None = None) -> Features:
    """Read a features file a row group at a time; with `item_ids`, check that row i belongs to item i.

    Vectors larger than memory are kept in a temporary file (`cm3.common.arrays.zeros`).

    Raises:
        UserError: unreadable, wrong columns, null vectors, ids in another order, or NaN in an ok row.
    """
    with _reading(path), pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        if schema.names != ["item_id", "embedding", "status"] or not pa.types.is_fixed_size_list(
            schema.field("embedding").type
        ):
            raise UserError(f"{path}: not a features file; its columns are {_brief(schema)}")
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
    return Features(ids, embedding, status, read_metadata(path))
