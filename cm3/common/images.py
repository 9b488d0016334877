"""Reading the original bytes of product images back from their shards."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from cm3.common.errors import UserError
from cm3.common.tables import MANIFEST, OK, read_table

IMAGES_PER_ROW_GROUP = 64


def shard_path(manifest: str | os.PathLike[str], shard: int) -> Path:
    """Return the path of shard number `shard` that belongs to a manifest file."""
    return Path(manifest).parent / f"shard-{shard:05d}.parquet"


def iter_images(manifest: str | os.PathLike[str], items: Sequence[int] | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (item, original bytes) for the items whose status is ok, one shard's row group in memory at a time.

    Args:
        manifest: the manifest.parquet; its shards are in the same folder.
        items: row numbers wanted, all by default. The order of the output is that of the shards.

    Raises:
        UserError: a shard is missing.
    """
    table = read_table(manifest, MANIFEST)
    status = np.asarray(table.column("status").to_pylist(), dtype=object)
    wanted = np.arange(len(table)) if items is None else np.asarray(items, dtype=np.int64)
    wanted = wanted[status[wanted] == OK]
    shard = table.column("shard").to_numpy()[wanted].astype(np.int64)
    row = table.column("row").to_numpy()[wanted].astype(np.int64)
    yield from images_at(manifest, wanted, shard, row)


def images_at(
    manifest: str | os.PathLike[str], items: np.ndarray, shard: np.ndarray, row: np.ndarray
) -> Iterator[tuple[int, bytes]]:
    """Yield (item, original bytes) as `iter_images` does, for items of known location: the manifest is not read.

    Args:
        manifest: the manifest.parquet; its shards are in the same folder.
        items: (n,) row numbers.
        shard, row: (n,) locations of their images, from the manifest.
    """
    order = np.lexsort((items, row, shard))
    items, shard, row = items[order], shard[order], row[order]
    for number in np.unique(shard):
        mine = shard == number
        yield from _iter_shard(shard_path(manifest, int(number)), items[mine], row[mine])


def _iter_shard(path: Path, items: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        raise UserError(
            f"{path}: does not exist, but its manifest does; delete manifest.parquet next to it and run again"
        )
    with pq.ParquetFile(path) as file:
        start = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            first, last = np.searchsorted(rows, [start, start + count])
            if last > first:
                values = file.read_row_group(group, columns=["bytes"]).column("bytes")
                for item, row in zip(items[first:last], rows[first:last], strict=True):
                    yield int(item), values[int(row) - start].as_py()
            start += count
