"""Content-addressed cache of encoder outputs, keyed by the sha256 of the model input.

Layout: `.cache/{stem of the output file}/{address}/*.parquet` in the folder of the output file. An address identifies
everything besides the input that determines an output: settings, model identity, versions of backend and stage.
Nothing is deleted automatically; `cached_outputs` lists what there is.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cm3.common.errors import DamagedFileError
from cm3.common.keys import KEY_LENGTH, key_of
from cm3.common.tables import OK, read_parquet

log = logging.getLogger(__name__)

FOLDER = ".cache"
EARLIER_FOLDER = ".kept"
"""Name of the cache before release 0.2."""
DIGEST = pa.binary(32)
"""sha256 of an input."""


def cache_address(identity: dict[str, Any], code: str) -> str:
    """Return the address of outputs: a hash of an extractor's identity and of the versions of stage and backend."""
    return key_of([identity, code])


def cache_folder(output: Path, address: str) -> Path:
    """Return the folder of the cached outputs of a features or captions file at an address."""
    return output.parent / FOLDER / output.stem / address


class OutputCache:
    """Finished shards of earlier jobs of one output file.

    Snakemake deletes a job's outputs before it runs the job, and does not know this folder. Files are added whole and
    never changed. Outputs of items that were removed stay, because the items may come back.
    """

    def __init__(self, output: Path, address: str | None) -> None:
        """Read the digests of all cached inputs, 40 bytes each; without an address nothing is looked up or added."""
        self._output = output
        self.folder = None if address is None else cache_folder(output, address)
        self._paths: list[Path] = []
        digests, files, rows = [pa.array([], DIGEST)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for path in sorted(self.folder.glob("*.parquet")) if self.folder else ():
            try:
                table = read_parquet(path, ["digest", "status"])
            except DamagedFileError as error:
                set_aside(error)
                continue
            ok = np.flatnonzero(np.asarray(table.column("status").to_pylist()) == OK)
            digests.append(table.column("digest").combine_chunks().take(pa.array(ok)))
            files.append(np.full(len(ok), len(self._paths), np.int32))
            rows.append(ok.astype(np.int32))
            self._paths.append(path)
        self._digests, self._files, self._rows = pa.concat_arrays(digests), np.concatenate(files), np.concatenate(rows)

    def find(self, digests: pa.FixedSizeBinaryArray) -> np.ndarray:
        """Return (N,) int64 positions of the outputs of N inputs, for `read`; -1 where an input is not cached."""
        # Takes a second to import, and the configuration is parsed with this module but without a lookup.
        import pyarrow.compute as pc

        positions: np.ndarray = pc.fill_null(pc.index_in(digests, value_set=self._digests), -1).to_numpy()
        return positions.astype(np.int64)

    def read(self, rows: np.ndarray, positions: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Yield (rows, table) file by file: the outputs of `rows` (R,), which `find` located at `positions` (R,).

        Raises:
            DamagedFileError: a file is damaged; `set_aside` it and look the rows up again.
        """
        order = np.argsort(self._files[positions], kind="stable")
        rows, positions = rows[order], positions[order]
        files, starts = np.unique(self._files[positions], return_index=True)
        parts = zip(files, np.split(rows, starts[1:]), np.split(positions, starts[1:]), strict=False)
        for file, some, at in parts:
            table = read_parquet(self._paths[file])
            yield some, table.take(pa.array(self._rows[at]))

    def add(self, shards: Path, address: str, work: str) -> None:
        """Move the finished shards of a job into the cache.

        Args:
            shards: the job's folder of shards; it is removed.
            address: address of their outputs, this cache's or another one's.
            work: key of the job's inputs, which makes the file names unique.
        """
        folder = cache_folder(self._output, address)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(shards.glob("[0-9]*.parquet")):
            path.replace(folder / f"{work}-{path.name}")


def set_aside(error: DamagedFileError) -> None:
    """Rename a damaged file of the cache, whose outputs are no longer found, and log a warning."""
    aside = error.path.with_name(f"{error.path.name}.damaged")
    log.warning(
        "%s: damaged (%s); its inputs are encoded again. It is renamed to %s and can be deleted",
        error.path,
        error.reason,
        aside.name,
    )
    error.path.replace(aside)


@dataclass(frozen=True)
class CachedOutputs:
    """One folder of cached outputs.

    Attributes:
        folder: the folder.
        extractor: name of the extractor in the config.
        key: key in the name of the output file.
        address: `cache_address` of the outputs.
        bytes: size of the files.
        rows: number of outputs.
    """

    folder: Path
    extractor: str
    key: str
    address: str
    bytes: int
    rows: int


def cached_outputs(processed: Path) -> list[CachedOutputs]:
    """Return all folders of cached encoder outputs below `processed`, those of releases before 0.2 included."""
    found = []
    for kind in ("captions", "features/*"):
        for name in (FOLDER, EARLIER_FOLDER):
            for folder in sorted(processed.glob(f"*/{kind}/{name}/*/*/")):
                files = list(folder.glob("*.parquet"))
                extractor, _, key = folder.parent.name.rpartition("-")
                if len(key) != KEY_LENGTH:
                    continue
                size = sum(path.stat().st_size for path in files)
                rows = sum(_rows(path) for path in files)
                found.append(CachedOutputs(folder, extractor, key, folder.name, size, rows))
    return found


def _rows(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException):
        return 0  # a damaged file: its size counts, its rows do not
