"""Shards of pictures: original bytes, each distinct picture once, in the order in which they are added."""

import contextlib
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from stages.files import atomic
from stages.pictures import PICTURES_PER_ROW_GROUP, shard_path
from stages.tables import PICTURES

SHARD_BYTES = 256_000_000


class ShardWriter:
    """Writes shard-00000.parquet, shard-00001.parquet, ... beside a manifest; where one ends depends on bytes only.

    Use as a context manager. Shards that are done stay when the body fails; the one being written goes.
    """

    def __init__(self, manifest: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.manifest, self.shard_bytes = manifest, shard_bytes
        self.count = 0
        self._places: dict[str, tuple[int, int]] = {}
        self._group: list[tuple[str, bytes]] = []
        self._rows = self._bytes = 0
        self._open: contextlib.ExitStack | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def add(self, sha256: str, data: bytes) -> tuple[int, int]:
        """Store a picture unless the same bytes are there already; return its (shard, row)."""
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
        if len(self._group) == PICTURES_PER_ROW_GROUP:
            self._flush()
        return place

    def _start(self) -> None:
        self._open = contextlib.ExitStack()
        temporary = self._open.enter_context(atomic(shard_path(self.manifest, self.count)))
        # Pictures are compressed already, and statistics over their bytes would store some of them twice.
        self._writer = self._open.enter_context(
            pq.ParquetWriter(temporary, PICTURES, compression="none", use_dictionary=False, write_statistics=["sha256"])
        )
        self.count += 1
        self._rows = self._bytes = 0

    def _flush(self) -> None:
        if self._group:
            digests, values = zip(*self._group, strict=True)
            self._writer.write_table(pa.table([digests, values], schema=PICTURES))
            self._group.clear()

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
