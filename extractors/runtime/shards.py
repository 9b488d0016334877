"""Shards: finished parts of an output file, stored until the whole file is written, so that a killed job resumes."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cm3.common.errors import DamagedFileError
from cm3.common.files import atomic
from cm3.common.keys import key_of
from cm3.common.tables import parquet_writer, read_parquet

log = logging.getLogger(__name__)

_PLACE = b"shard"
"""Key in the metadata of a shard: the address and work of its folder, and its number."""


class Shards:
    """A hidden folder next to an output file, tied by its name to everything that its content depends on.

    Attributes:
        folder: the folder.
        work: key of the inputs and of how they are divided into shards.
    """

    def __init__(self, output: Path, address: str, work: Any) -> None:
        """Name the folder.

        Args:
            output: the file that the shards become.
            address: address of the outputs in the cache.
            work: the inputs of each shard, as JSON values.
        """
        self._parent, self._prefix = output.parent, f".{output.name}.shards-"
        self.work = key_of(work)
        self.folder = self._parent / f"{self._prefix}{address}-{self.work}"

    def leftovers(self) -> Iterator[tuple[Path, str, str]]:
        """Yield the folders that other jobs for this output file left, each with its address and work."""
        for other in sorted(self._parent.glob(f"{self._prefix}*-*")):
            if other != self.folder:
                address, _, work = other.name.removeprefix(self._prefix).partition("-")
                yield other, address, work

    def discard(self) -> None:
        """Remove the finished shards, so that the next job starts from the beginning."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self, rows: np.ndarray, size: int | None, work: Callable[[np.ndarray], pa.Table]
    ) -> Iterator[tuple[np.ndarray, pa.Table, bool]]:
        """Yield (rows of a shard, its table, whether an earlier job finished it), shard by shard.

        A finished shard that is damaged is made again, with a warning.

        Args:
            rows: all rows to work on, in order.
            size: rows per shard; None: a single shard.
            work: makes a table of len(rows) rows; its schema metadata is kept.
        """
        step = size or max(1, len(rows))
        parts = [rows[start : start + step] for start in range(0, len(rows), step)]
        paths = [self.folder / f"{number:06d}.parquet" for number in range(len(parts))]
        finished = [path.exists() for path in paths]
        if any(finished):
            log.info("resuming: %d of %d shards are finished", sum(finished), len(parts))
        for number, (part, path) in enumerate(zip(parts, paths, strict=True)):
            place = f"{self.folder.name.removeprefix(self._prefix)}/{number}"
            table = _read_finished(path, place, len(part)) if finished[number] else None
            if before := table is not None:
                yield part, table, before
                continue
            table = work(part)
            table = table.replace_schema_metadata((table.schema.metadata or {}) | {_PLACE: place.encode()})
            options = {"compression": "none", "use_dictionary": False}
            with atomic(path) as temporary, parquet_writer(temporary, table.schema, **options) as writer:
                writer.write_table(table)
            yield part, read_parquet(path), before


def _read_finished(path: Path, place: str, rows: int) -> pa.Table | None:
    """Return the table of a finished shard, None if it is damaged or another shard; then it is removed with a warning."""
    try:
        table = read_parquet(path)
        found = (table.schema.metadata or {}).get(_PLACE, place.encode())  # shards of earlier releases have none
        if found != place.encode() or len(table) != rows:
            raise DamagedFileError(path, f"it holds {len(table)} rows of shard {found.decode(errors='replace')}")
    except DamagedFileError as error:
        log.warning("%s: damaged (%s); removed, its inputs are worked on again", path, error.reason)
        path.unlink(missing_ok=True)
        return None
    return table


def with_notes(table: pa.Table, notes: dict[str, Any]) -> pa.Table:
    """Return a shard's table with notes on how it was made, as schema metadata."""
    return table.replace_schema_metadata({b"notes": json.dumps(notes, sort_keys=True).encode()})


def notes_of(table: pa.Table) -> dict[str, Any]:
    """Return the notes that `with_notes` stored."""
    notes: dict[str, Any] = json.loads((table.schema.metadata or {})[b"notes"])
    return notes
