"""Arrow schemas of the tables that stages exchange, and checked reading and writing of them."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cm3.common.errors import UserError
from cm3.common.files import atomic

OK, MISSING, FAILED = "ok", "missing", "failed"
SPLITS = ("train", "valid", "test")
ROW_GROUP = 8192
MADE_FROM = "made_from"
"""Key in the metadata of a table whose path does not tell its settings: stage -> key of the settings that made it."""

CATEGORY = pa.dictionary(pa.int8(), pa.string())

INTERACTIONS = pa.schema(
    [
        ("user", pa.int32()),
        ("item", pa.int32()),
        ("rating", pa.float32()),
        ("timestamp", pa.int64()),  # Unix seconds
        ("split", CATEGORY),  # train, valid or test
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
        ("status", CATEGORY),  # ok, missing or failed
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
        ("status", CATEGORY),
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
    """Write several tables as one file, as `write_table` does; one table is in memory at a time."""
    described = schema.with_metadata(encode_metadata(metadata))
    with atomic(path) as temporary, pq.ParquetWriter(temporary, described, compression="zstd") as writer:
        for table in tables:
            if table.column_names != schema.names:
                raise ValueError(f"{path}: columns {table.column_names} are not {schema.names}")
            writer.write_table(table.cast(described), row_group_size=ROW_GROUP * 16)


def read_table(path: str | os.PathLike[str], schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet table, or some of its columns, and check its schema.

    Raises:
        UserError: the file is absent, unreadable, or has other columns or types than `schema`.
    """
    with reading_parquet(path), pq.ParquetFile(path) as file:
        found = file.schema_arrow.remove_metadata()
        if not found.equals(schema):
            raise UserError(
                f"{path}: has columns {describe_columns(found)}, but {describe_columns(schema)} are expected; delete it and run again"
            )
        return file.read(None if columns is None else list(columns))


@contextlib.contextmanager
def reading_parquet(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of reading a Parquet file into a UserError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); delete it and run again") from error


def describe_columns(schema: pa.Schema) -> str:
    """Return names and types of a schema's columns for a message."""
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def encode_metadata(metadata: dict[str, Any] | None) -> dict[bytes, bytes]:
    """Return metadata as Parquet stores it: bytes by bytes, values as JSON."""
    return {k.encode(): json.dumps(v, sort_keys=True).encode() for k, v in (metadata or {}).items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON metadata that `write_table` or `write_features` stored in a Parquet file's schema."""
    stored = pq.read_schema(path).metadata or {}
    return {k.decode(): json.loads(v) for k, v in stored.items() if not k.startswith(b"ARROW:")}
