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
    """Yield (item, original bytes) for the items whose status is ok, a few row groups in memory at a time.

    Args:
        manifest: the manifest.parquet; its shards are in the same folder.
        items: row numbers wanted, all by default. The order of the output is that of `reading_order`.

    Raises:
        DamagedFileError: a shard is missing, cut, or holds other bytes than the manifest says.
    """
    table = read_table(manifest, MANIFEST)
    status = np.asarray(table.column("status").to_pylist(), dtype=object)
    wanted = np.arange(len(table)) if items is None else np.unique(np.asarray(items, dtype=np.int64))
    wanted = wanted[status[wanted] == OK]
    shard = table.column("shard").to_numpy()[wanted].astype(np.int64)
    row = table.column("row").to_numpy()[wanted].astype(np.int64)
    order = reading_order(shard, row)
    wanted = wanted[order]
    digests = [table.column("sha256")[item].as_py() for item in wanted.tolist()]
    yield from images_at(manifest, wanted, shard[order], row[order], digests)


def reading_order(shard: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return the order in which the images of ascending items (n,) are read: equal images one after another.

    It depends on the items and their images alone, not on the shards, whose images are in the order of items as well.

    Args:
        shard, row: (n,) locations of the images.
    """
    places = shard.astype(np.int64) << 32 | row.astype(np.int64)
    _, first, same = np.unique(places, return_index=True, return_inverse=True)
    order: np.ndarray = np.argsort(first[same], kind="stable")
    return order


def images_at(
    manifest: str | os.PathLike[str], items: np.ndarray, shard: np.ndarray, row: np.ndarray, digests: Sequence[str]
) -> Iterator[tuple[int, bytes]]:
    """Yield (item, original bytes) of items of known location, in their order: the manifest is not read.

    Args:
        manifest: the manifest.parquet; its shards are in the same folder.
        items: (n,) row numbers. A shard is read once if its images are wanted in ascending order.
        shard, row: (n,) locations of their images, from the manifest.
        digests: n sha256 of their images, 64 hex digits each, from the manifest.

    Raises:
        DamagedFileError: as `iter_images`.
    """
    shards = {number: _ShardReader(shard_path(manifest, number), row[shard == number]) for number in np.unique(shard)}
    for item, number, place, digest in zip(items.tolist(), shard.tolist(), row.tolist(), digests, strict=True):
        yield item, shards[number].read(place, digest)


class _ShardReader:
    """Reads some rows of a shard; a row group is in memory from its first wanted row to its last."""

    def __init__(self, path: Path, rows: np.ndarray) -> None:
        self._path, self._rows, self._left = path, np.unique(rows), len(rows)
        self._start = 0
        self._data: pa.ChunkedArray | None = None
        self._groups: Iterator[tuple[int, pa.Table]] | None = None

    def read(self, row: int, digest: str) -> bytes:
        """Return the image in a row, whose sha256 must be `digest`."""
        if self._groups is None or row < self._start:
            self._groups, self._data = row_groups(self._path, self._rows), None
        while self._data is None or row >= self._start + len(self._data):
            self._data = None  # before the next one is read
            start, group = next(self._groups, (0, None))
            if group is None:
                raise DamagedFileError(self._path, f"it has no row {row}, which the manifest names")
            self._start, self._data = start, group.column("bytes")
        image: bytes | None = self._data[row - self._start].as_py()
        if image is None or hashlib.sha256(image).hexdigest() != digest:
            raise DamagedFileError(self._path, f"the image in row {row} is not the one that the manifest names")
        self._left -= 1
        if not self._left:
            self._groups = self._data = None  # closes the file
        return image


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
