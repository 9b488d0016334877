"""Image shards: Parquet files of original bytes, each distinct image once, in the order of adding."""

import contextlib
import os
import shutil
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from cm3.common.files import atomic
from cm3.common.images import IMAGES_PER_ROW_GROUP, shard_path
from cm3.common.tables import IMAGES, parquet_writer

SHARD_BYTES = 256_000_000
KNOWN = ".known.parquet"
"""Table next to the manifest that an image source keeps for the next run; it describes the shards."""
# Readers and the writer have one row group in memory.
_ROW_GROUP_BYTES = 16_000_000


def fresh_folder(folder: Path) -> Path:
    """Return the empty folder inside `folder` that the next manifest and shards are written to.

    Files of a run that was killed while moving them to their place (see `put_in_place`) are moved first.
    """
    fresh = folder / ".fresh"
    if (fresh / "manifest.parquet").exists():
        _move(fresh, folder)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    return fresh


def put_in_place(fresh: Path, manifest: Path) -> None:
    """Replace shards, known outcomes and manifest by those in `fresh`, where manifest.parquet must be written last.

    A kill at any moment loses nothing: while `fresh` holds a manifest, all its files are complete, and every image
    is either there or in its place. The manifest is moved last, so shards of another manifest are never read.
    """
    shards = {path.name for path in fresh.glob("shard-*.parquet")}
    if not (fresh / KNOWN).exists():
        (manifest.parent / KNOWN).unlink(missing_ok=True)
    _move(fresh, manifest.parent)
    for path in manifest.parent.glob("shard-*.parquet"):
        if path.name not in shards:
            path.unlink()
    (fresh / "manifest.parquet").replace(manifest)
    shutil.rmtree(fresh)


def _move(fresh: Path, folder: Path) -> None:
    # Outcomes first: the old ones do not know the new images, the new ones need no old image.
    if (fresh / KNOWN).exists():
        (fresh / KNOWN).replace(folder / KNOWN)
    for path in sorted(fresh.glob("shard-*.parquet")):
        path.replace(folder / path.name)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """Writes shard-00000.parquet, shard-00001.parquet, ... next to a manifest; the boundaries depend on bytes only.

    Use as a context manager. If the body fails, finished shards stay and the current one is deleted.
    """

    def __init__(self, manifest: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.manifest, self.shard_bytes = manifest, shard_bytes
        self.count = 0
        self._places: dict[str, tuple[int, int]] = {}
        self._group: list[tuple[str, bytes]] = []
        self._rows = self._bytes = self._group_bytes = 0
        self._open: contextlib.ExitStack | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def add(self, sha256: str, data: bytes) -> tuple[int, int]:
        """Store an image unless the same bytes are stored already; return its (shard, row)."""
        if sha256 in self._places:
            return self._places[sha256]
        if self._open is not None and self._bytes + len(data) > self.shard_bytes:
            self._finish()
        if self._open is None:
            self._start()
        place = self._places[sha256] = (self.count - 1, self._rows)
        self._group.append((sha256, data))
        self._rows += 1
        self._bytes += len(data)
        self._group_bytes += len(data)
        if len(self._group) == IMAGES_PER_ROW_GROUP or self._group_bytes >= _ROW_GROUP_BYTES:
            self._flush()
        return place

    def _start(self) -> None:
        self._open = contextlib.ExitStack()
        temporary = self._open.enter_context(atomic(shard_path(self.manifest, self.count)))
        # Images are compressed already, and column statistics over their bytes would store some of them twice.
        self._writer = self._open.enter_context(
            parquet_writer(temporary, IMAGES, compression="none", use_dictionary=False, write_statistics=["sha256"])
        )
        self.count += 1
        self._rows = self._bytes = 0

    def _flush(self) -> None:
        if self._group:
            digests, values = zip(*self._group, strict=True)
            self._writer.write_table(pa.table([digests, values], schema=IMAGES))
            self._group.clear()
            self._group_bytes = 0

    def _finish(self) -> None:
        if self._open is not None:
            self._flush()
            self._open.close()
            self._open = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._open is not None:
            self._open.__exit__(kind, error, trace)
