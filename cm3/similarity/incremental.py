"""Incremental exact nearest neighbours: rows that stayed are compared with new rows only.

A stored list holds the best k + SPARE neighbours of a row and is certain down to some depth: no row outside the list
ranks above an entry within. When rows are removed, the rest of a list is still the best of the remaining rows. The same
holds for the union of a row's list and its best new rows, down to the last old entry. A list with fewer than k certain
entries is searched again.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from cm3.common.errors import DamagedFileError
from cm3.common.files import atomic
from cm3.common.tables import parquet_writer, read_parquet
from cm3.similarity.exact import knn

log = logging.getLogger("cm3.similarity.stage")

FOLDER = ".kept"
SPARE = 4
"""Neighbours stored beyond k: so many of a list may be removed before the row is searched again."""

WORTHWHILE = 0.7
"""Largest fraction of a full search's products for which an update is used."""

_KEY = pa.binary(32)
_ROWS = 2**16


@dataclass(frozen=True)
class NeighbourLists:
    """The nearest rows of each of N rows.

    Attributes:
        keys: (N,) sha256 of an item's id and vector; all distinct.
        indices: (N, m) int32 row numbers, best first; -1 where the entry is not certain.
        scores: (N, m) float32; -inf where the entry is not certain.
    """

    keys: pa.FixedSizeBinaryArray
    indices: np.ndarray
    scores: np.ndarray


def keys_of(item_ids: Sequence[str], vectors: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Return (N,) sha256 of N ids and their (N, d) vectors."""
    pairs = zip(item_ids, vectors, strict=True)
    return pa.array(
        (
            hashlib.sha256(vector.tobytes() + b"\0" + name.encode("utf-8", "surrogatepass")).digest()
            for name, vector in pairs
        ),
        _KEY,
    )


def neighbours(
    keys: pa.FixedSizeBinaryArray, vectors: Tensor, k: int, earlier: NeighbourLists | None
) -> tuple[NeighbourLists, int]:
    """Return lists whose first k entries are bit-identical to `knn(vectors, k)`, and the number of rows searched.

    Args:
        keys: (N,) of the rows (`keys_of`).
        vectors: (N, d) float32, on the device of the search.
        k: neighbours per row, itself included.
        earlier: stored lists for the same k.

    Raises:
        ValueError: fewer than k rows.
    """
    n, width = len(vectors), min(len(vectors), k + SPARE)
    if earlier is not None and width == earlier.indices.shape[1] == k + SPARE:
        now_at = pc.fill_null(pc.index_in(earlier.keys, value_set=keys), -1).to_numpy().astype(np.int64)
        stay = np.flatnonzero(now_at >= 0)
        rows = now_at[stay]
        new = np.setdiff1d(np.arange(n), rows)
        indices, scores = _renumbered(earlier, stay, now_at)
        reused = (indices >= 0).sum(axis=1) >= k
        searched = n - int(reused.sum())
        if searched * n + (n - searched) * len(new) <= WORTHWHILE * n * n:
            return _updated(keys, vectors, rows[reused], new, indices[reused], scores[reused]), searched
    found, values = knn(vectors, width)
    return NeighbourLists(keys, found.cpu().numpy().astype(np.int32), values.cpu().numpy()), n


def _renumbered(earlier: NeighbourLists, stay: np.ndarray, now_at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lists (S, m) of the rows that stay, with new row numbers; -1 and -inf for removed or uncertain entries."""
    lists, scores = earlier.indices[stay], earlier.scores[stay]
    certain = lists >= 0
    if (np.diff(now_at[stay]) < 0).any():
        # Equal scores are ordered by row number; under new numbers a row outside the list may precede one of equal score.
        least = np.where(certain, scores, np.inf).min(axis=1, keepdims=True)
        certain &= scores > least
    indices = np.where(certain, now_at[lists], -1)
    return indices, np.where(indices >= 0, scores, -np.inf).astype(np.float32)


def _updated(
    keys: pa.FixedSizeBinaryArray,
    vectors: Tensor,
    rows: np.ndarray,
    new: np.ndarray,
    old: np.ndarray,
    known: np.ndarray,
) -> NeighbourLists:
    """Return the lists of all rows: of `rows` (S,) from their old (S, m) lists and the `new` rows (A,), of others by search."""
    n, width = len(vectors), old.shape[1]
    indices, scores = np.empty((n, width), np.int32), np.empty((n, width), np.float32)
    if len(again := np.setdiff1d(np.arange(n), rows)):
        found, cosines = knn(vectors, width, rows=torch.from_numpy(again))
        indices[again], scores[again] = found.cpu().numpy(), cosines.cpu().numpy()
    if len(new) and len(rows):
        among, best = knn(vectors, min(width, len(new)), rows=torch.from_numpy(rows), among=torch.from_numpy(new))
        added, gained = among.cpu().numpy().astype(np.int32), best.cpu().numpy()
    else:
        added, gained = np.empty((len(rows), 0), np.int32), np.empty((len(rows), 0), np.float32)
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        both, values = np.hstack([old[part], added[part]]), np.hstack([known[part], gained[part]])
        order = np.lexsort((both, -values), axis=1)
        both, values = np.take_along_axis(both, order, 1), np.take_along_axis(values, order, 1)
        was = (order < width) & (both >= 0)
        # Down to the last old entry: below it, rows outside the old list may rank between the new ones.
        last = both.shape[1] - 1 - was[:, ::-1].argmax(axis=1)
        certain = np.arange(width) <= last[:, None]
        indices[rows[part]] = np.where(certain, both[:, :width], -1)
        scores[rows[part]] = np.where(certain, values[:, :width], -np.inf)
    return NeighbourLists(keys, indices, scores)


def lists_path(output: Path) -> Path:
    """Return the path of the lists behind a graph: not an output of the job, which Snakemake would delete first."""
    return output.parent / FOLDER / output.name


def read_lists(path: Path, code: str) -> NeighbourLists | None:
    """Return stored lists; None where there are none, or they have another code version, or are damaged."""
    if not path.exists():
        return None
    try:
        table = read_parquet(path)
    except DamagedFileError as error:
        log.warning("%s: damaged (%s); removed, all rows are searched", path, error.reason)
        path.unlink(missing_ok=True)
        return None
    if (table.schema.metadata or {}).get(b"code") != code.encode():
        return None
    columns = [table.column(name).combine_chunks() for name in ("indices", "scores")]
    indices, scores = (c.flatten().to_numpy().reshape(-1, c.type.list_size) for c in columns)
    return NeighbourLists(table.column("key").combine_chunks(), indices, scores)


def write_lists(path: Path, lists: NeighbourLists, code: str) -> None:
    """Store lists for the next run, atomically."""
    width = lists.indices.shape[1]
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
        for values in (lists.indices, lists.scores)
    ]
    table = pa.table([lists.keys, *columns], names=["key", "indices", "scores"])
    table = table.replace_schema_metadata({"code": code})
    options = {"compression": "zstd", "use_dictionary": False}
    with atomic(path) as temporary, parquet_writer(temporary, table.schema, **options) as writer:
        writer.write_table(table)
