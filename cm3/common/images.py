"""Reading the original bytes of product images back from their shards; each is compared with its sha256 in the manifest."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from cm3.common.errors import DamagedFileError, machine_fault
from cm3.common.tables import IMAGES, MANIFEST, OK, open_parquet, read_table

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
        DamagedFileError: a shard is missing, cut, or holds other bytes than the manifest says.
    """
    table = read_table(manifest, MANIFEST)
    status = np.asarray(table.column("status").to_pylist(), dtype=object)
    wanted = np.arange(len(table)) if items is None else np.asarray(items, dtype=np.int64)
    wanted = wanted[status[wanted] == OK]
    shard = table.column("shard").to_numpy()[wanted].astype(np.int64)
    row = table.column("row").to_numpy()[wanted].astype(np.int64)
    digests = [table.column("sha256")[item].as_py() for item in wanted.tolist()]
    yield from images_at(manifest, wanted, shard, row, digests)


def images_at(
    manifest: str | os.PathLike[str], items: np.ndarray, shard: np.ndarray, row: np.ndarray, digests: Sequence[str]
) -> Iterator[tuple[int, bytes]]:
    """Yield (item, original bytes) as `iter_images` does, for items of known location: the manifest is not read.

    Args:
        manifest: the manifest.parquet; its shards are in the same folder.
        items: (n,) row numbers.
        shard, row: (n,) locations of their images, from the manifest.
        digests: n sha256 of their images, 64 hex digits each, from the manifest.
    """
    order = np.lexsort((items, row, shard))
    items, shard, row = items[order], shard[order], row[order]
    expected = [digests[place] for place in order]
    for number in np.unique(shard):
        first, last = np.searchsorted(shard, [number, number + 1])
        path = shard_path(manifest, int(number))
        yield from _iter_shard(path, items[first:last], row[first:last], expected[first:last])


def _iter_shard(path: Path, items: np.ndarray, rows: np.ndarray, digests: Sequence[str]) -> Iterator[tuple[int, bytes]]:
    read = 0
    for start, group in row_groups(path, rows):
        data = group.column("bytes")
        last = int(np.searchsorted(rows, start + len(group)))
        for item, row, digest in zip(items[read:last], rows[read:last], digests[read:last], strict=True):
            image = data[int(row) - start].as_py()
            if image is None or hashlib.sha256(image).hexdigest() != digest:
                raise DamagedFileError(path, f"the image in row {row} is not the one that the manifest names")
            yield int(item), image
        read = last
    if read < len(rows):
        raise DamagedFileError(path, f"it has no row {rows[read]}, which the manifest names")


def row_groups(path: Path, rows: np.ndarray | None = None) -> Iterator[tuple[int, pa.Table]]:
    """Yield (number of its first row, table) of the row groups of an image shard, or of those with one of `rows`.

    Args:
        path: the shard.
        rows: sorted row numbers; all by default.

    Raises:
        DamagedFileError: it is missing or unreadable.
    """
    if not path.is_file():
        raise DamagedFileError(path, "it is missing")
    with memory_for(path), open_parquet(path) as file:
        if not file.schema_arrow.remove_metadata().equals(IMAGES):
            raise DamagedFileError(path, "its columns are not those of an image shard")
        start = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if rows is None or np.searchsorted(rows, start) < np.searchsorted(rows, start + count):
                yield start, file.read_row_group(group)
            start += count


@contextlib.contextmanager
def memory_for(path: Path) -> Iterator[None]:
    """Raise DamagedFileError for a MemoryError in the body, unless there is too little memory even for the whole file.

    A damaged length in a file makes Arrow ask for any number of bytes.
    """
    try:
        yield
    except MemoryError as error:
        try:
            np.empty(max(2 * path.stat().st_size, 1 << 24), np.uint8)
        except MemoryError:
            if fault := machine_fault(error, f"reading {path}"):
                raise fault from error
        raise DamagedFileError(path, f"a length in it is wrong ({error})") from error
