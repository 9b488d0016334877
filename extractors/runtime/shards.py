"""Finished parts of a stage's output, kept until the whole is written: a killed job redoes only what is unfinished."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cm3.common.files import atomic
from cm3.common.keys import key_of

log = logging.getLogger(__name__)


class Shards:
    """A hidden folder beside an output file, tied to all that its content depends on."""

    def __init__(self, output: Path, address: str, work: Any) -> None:
        """Name the folder.

        Args:
            output: the file that the shards become.
            address: key of what decides an output beside its input.
            work: which inputs go into which shard.
        """
        self._output = output
        self._prefix = f".{output.name}.shards-{address}-"
        self.folder = output.parent / f"{self._prefix}{key_of(work)}"

    def leftovers(self) -> Iterator[tuple[Path, bool]]:
        """Yield the folders that other jobs for this output left, and whether their shards are of the same address."""
        for other in sorted(self._output.parent.glob(f".{self._output.name}.shards-*")):
            if other != self.folder:
                yield other, other.name.startswith(self._prefix)

    def discard(self) -> None:
        """Remove what is finished, so that the next job starts anew."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self, rows: np.ndarray, size: int | None, work: Callable[[np.ndarray], pa.Table]
    ) -> Iterator[tuple[np.ndarray, pa.Table, bool]]:
        """Yield (rows of a shard, its table, whether it was finished before), shard by shard.

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
            log.info("%d of %d shards are finished from before", sum(finished), len(parts))
        for part, path, before in zip(parts, paths, finished, strict=True):
            if not before:
                with atomic(path) as temporary:
                    pq.write_table(
                        work(part), temporary, compression="none", use_dictionary=False, write_page_checksum=True
                    )
            yield part, pq.read_table(path, partitioning=None), before


def with_notes(table: pa.Table, notes: dict[str, Any]) -> pa.Table:
    """Return a shard's table with facts about how it came to be."""
    return table.replace_schema_metadata({b"notes": json.dumps(notes, sort_keys=True).encode()})


def notes_of(table: pa.Table) -> dict[str, Any]:
    """Return what `with_notes` stored."""
    return json.loads((table.schema.metadata or {})[b"notes"])
