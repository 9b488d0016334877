"""Arrow schemas of the tables that stages exchange, and checked reading and writing of them."""

import contextlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cm3.common.checksums import PARQUET_KEY, add_parquet_checksum, check_parquet
from cm3.common.errors import DamagedFileError, UserError
from cm3.common.files import atomic, file_error

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
REVIEWS = pa.schema([("user", pa.int32()), ("item", pa.int32()), ("text", pa.string())])
"""Texts of reviews, plain text and not empty, by user and item; of all interactions, whatever their split."""
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
RUN_RECOMMENDATIONS = pa.schema(
    [
        ("user", pa.int32()),
        ("item", pa.int32()),
        ("rank", pa.int32()),  # 1 is the best
        ("score", pa.float32()),
    ]
)
"""Recommendations of a run, whose users and items are rows of the tables of the data set (`cm3.evaluation.recommendations`)."""
SIMILARITY = pa.schema([("item", pa.int32()), ("neighbour", pa.int32()), ("score", pa.float32())])


def write_table(
    path: str | os.PathLike[str],
    table: pa.Table,
    schema: pa.Schema,
    metadata: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Write `table` as Parquet (zstd) under exactly `schema`, atomically.

    `metadata` values are stored as JSON in the schema's metadata (read them with `read_metadata`). `options` are those of
    a ParquetWriter.

    Raises:
        ValueError: the table's columns are not those of the schema.
    """
    write_tables(path, [table], schema, metadata, **options)


def write_tables(
    path: str | os.PathLike[str],
    tables: Iterable[pa.Table],
    schema: pa.Schema,
    metadata: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Write several tables as one file, as `write_table` does; one table is in memory at a time."""
    described = schema.with_metadata(encode_metadata(metadata))
    with atomic(path) as temporary, parquet_writer(temporary, described, **{"compression": "zstd"} | options) as writer:
        for table in tables:
            if table.column_names != schema.names:
                raise ValueError(f"{path}: columns {table.column_names} are not {schema.names}")
            writer.write_table(table.cast(described), row_group_size=ROW_GROUP * 16)


@contextlib.contextmanager
def parquet_writer(path: Path, schema: pa.Schema, **options: Any) -> Iterator[pq.ParquetWriter]:
    """Yield a writer of a Parquet file with checksums (`cm3.common.checksums`); `path` is a temporary file."""
    with pq.ParquetWriter(path, schema, write_page_checksum=True, **options) as writer:
        yield writer
        writer.add_key_value_metadata({PARQUET_KEY: "1"})
    add_parquet_checksum(path)


@contextlib.contextmanager
def open_parquet(path: str | os.PathLike[str], **options: Any) -> Iterator[pq.ParquetFile]:
    """Yield a Parquet file of the pipeline, whose checksums are compared; files of earlier releases have none.

    The pages that the body reads are compared while it reads them.

    Raises:
        DamagedFileError: the checksums differ, or the file is no readable Parquet file.
        UserError: absent or without permission.
    """
    with reading_parquet(path):
        check_parquet(path)
        with pq.ParquetFile(path, page_checksum_verification=True, **options) as file:
            yield file


def read_parquet(path: str | os.PathLike[str], columns: Sequence[str] | None = None, rows: Any = None) -> pa.Table:
    """Return a Parquet table of the pipeline, or some of its columns and rows.

    Args:
        path: the file.
        columns: their names; None: all.
        rows: an Arrow expression over these columns, true for the rows wanted; the file is read batch by batch.

    Raises:
        DamagedFileError: as `open_parquet`.
        UserError: absent, or without such a column.
    """
    with open_parquet(path) as file:
        if columns is not None and (absent := [name for name in columns if name not in file.schema_arrow.names]):
            raise UserError(f"{path}: has no column {', '.join(absent)}; delete it and run again")
        names = file.schema_arrow.names if columns is None else list(columns)
        if rows is None:
            return file.read(names)
        parts = [pa.Table.from_batches([batch]).filter(rows) for batch in file.iter_batches(columns=names)]
        return pa.concat_tables(parts) if parts else file.read(names)


def read_table(path: str | os.PathLike[str], schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet table, or some of its columns, and check its schema.

    Raises:
        DamagedFileError: as `open_parquet`.
        UserError: the file is absent, or has other columns or types than `schema`.
    """
    with open_parquet(path) as file:
        found = file.schema_arrow.remove_metadata()
        if not found.equals(schema):
            raise UserError(
                f"{path}: has columns {describe_columns(found)}, but {describe_columns(schema)} are expected; delete it and run again"
            )
        return file.read(None if columns is None else list(columns))


def release_memory() -> None:
    """Give the memory that Arrow keeps for further reads back to the operating system."""
    pa.default_memory_pool().release_unused()


@contextlib.contextmanager
def reading_parquet(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of reading a Parquet file into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise file_error(path, error) from None
        raise DamagedFileError(path, _first_line(error)) from error  # Arrow's own, without a number of the system
    except MemoryError:
        raise
    except (pa.ArrowException, UnicodeDecodeError, struct.error) as error:
        raise DamagedFileError(path, _first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def describe_columns(schema: pa.Schema) -> str:
    """Return names and types of a schema's columns for a message."""
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def encode_metadata(metadata: dict[str, Any] | None) -> dict[bytes, bytes]:
    """Return metadata as Parquet stores it: bytes by bytes, values as JSON."""
    return {k.encode(): json.dumps(v, sort_keys=True).encode() for k, v in (metadata or {}).items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON metadata that `write_table` or `write_features` stored in a Parquet file's schema."""
    with open_parquet(path) as file:
        return metadata_of(path, file.schema_arrow)


def metadata_of(path: str | os.PathLike[str], schema: pa.Schema) -> dict[str, Any]:
    """Return the JSON metadata of a schema that was read from `path`."""
    try:
        return {
            k.decode(): json.loads(v)
            for k, v in (schema.metadata or {}).items()
            if not k.startswith(b"ARROW:") and k != PARQUET_KEY.encode()
        }
    except ValueError as error:
        raise DamagedFileError(path, f"its metadata are not JSON: {error}") from None
