"""What was encoded before, found by what the model was shown: an input that did not change is never encoded again."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cm3.common.errors import UserError
from cm3.common.tables import OK

log = logging.getLogger(__name__)

FOLDER = ".kept"
DIGEST = pa.binary(32)
"""sha256 of an input."""


class Kept:
    """Finished shards of earlier runs, in a hidden folder beside the output.

    Snakemake deletes a job's outputs before it runs the job, and knows nothing of this folder. Its name holds the key
    of all that decides an output beside the input itself: model, settings, code, libraries. Files are added whole and
    never changed; outputs of items that are gone stay, for they may come back.
    """

    def __init__(self, output: Path, address: str | None) -> None:
        """Note which digests are there, 40 bytes each, and where; with no address nothing is found or kept."""
        self.folder = None if address is None else output.parent / FOLDER / output.stem / address
        self._paths: list[Path] = []
        digests, files, rows = [pa.array([], DIGEST)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for path in sorted(self.folder.glob("*.parquet")) if self.folder else ():
            try:
                table = pq.read_table(path, columns=["digest", "status"], partitioning=None)
            except (OSError, pa.ArrowException) as error:
                log.warning("%s cannot be read (%s); what it held is encoded again", path, error)
                path.unlink(missing_ok=True)
                continue
            ok = np.flatnonzero(np.asarray(table.column("status").to_pylist()) == OK)
            digests.append(table.column("digest").combine_chunks().take(pa.array(ok)))
            files.append(np.full(len(ok), len(self._paths), np.int32))
            rows.append(ok.astype(np.int32))
            self._paths.append(path)
        self._digests, self._files, self._rows = pa.concat_arrays(digests), np.concatenate(files), np.concatenate(rows)

    def find(self, digests: pa.FixedSizeBinaryArray) -> np.ndarray:
        """Return (N,) int64, where the output of each of N inputs is kept: for `tables`; -1 for none."""
        # A second to import, and the configuration is read with this module but without looking anything up.
        import pyarrow.compute as pc

        return pc.fill_null(pc.index_in(digests, value_set=self._digests), -1).to_numpy().astype(np.int64)

    def tables(self, rows: np.ndarray, places: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Yield (rows, table) file by file: the outputs of `rows` (R,), which `find` placed at `places` (R,).

        Raises:
            UserError: a file is damaged.
        """
        order = np.argsort(self._files[places], kind="stable")
        rows, places = rows[order], places[order]
        files, starts = np.unique(self._files[places], return_index=True)
        for file, some, at in zip(files, np.split(rows, starts[1:]), np.split(places, starts[1:]), strict=False):
            path = self._paths[file]
            try:
                table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{path}: cannot be read ({error}); delete it and run again") from error
            yield some, table.take(pa.array(self._rows[at]))

    def adopt(self, shards: Path) -> None:
        """Take over the finished shards of a job, for those who look after this; without an address, remove them."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(shards.glob("[0-9]*.parquet")):
                path.replace(self.folder / f"{shards.name.rpartition('-')[2]}-{path.name}")
        shutil.rmtree(shards, ignore_errors=True)

    def drop_others(self) -> None:
        """Remove what the same output's earlier code or libraries made: call it when the output is written anew."""
        for other in self.folder.parent.iterdir() if self.folder and self.folder.exists() else ():
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)


class Distinct:
    """Rows grouped by equal inputs, of which one is encoded for all.

    Attributes:
        rows: (D,) the first row of each group, in the order given.
        digests: (D,) their inputs' digests.
    """

    def __init__(self, rows: np.ndarray, digests: pa.FixedSizeBinaryArray) -> None:
        """Group `rows` (R,) by the `digests` (N,) of all rows."""
        encoded = digests.take(pa.array(rows)).dictionary_encode()
        # Numbered by first appearance.
        group = encoded.indices.to_numpy()
        self.rows, self.digests = rows[np.unique(group, return_index=True)[1]], encoded.dictionary
        order = np.argsort(group, kind="stable")
        self._rows, self._group = rows[order], group[order]

    def members(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows (R,) of the groups start to stop, and each one's group (R,) counted from start."""
        first, last = np.searchsorted(self._group, [start, stop])
        return self._rows[first:last], self._group[first:last] - start
