"""Neighbours of data that changed a little: of rows that stayed, only the new ones are looked at. The result is exact.

A stored list holds the best k + SPARE rows and is certain down to some depth: nothing outside it comes before an entry
within. When rows go, the others of a list are still the best of those that stay. So is what a row's list and its best
among the new rows make together, down to the last old entry. A list that is certain for fewer than k is searched anew.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cm3.common.files import atomic
from cm3.similarity.exact import knn

log = logging.getLogger("cm3.similarity.stage")

FOLDER = ".kept"
SPARE = 4
"""Neighbours beyond k that are stored: so many of a row's may go before it is searched anew."""

WORTHWHILE = 0.7
"""Share of a full search's products up to which an update is taken to be cheaper."""

_KEY = pa.binary(32)
_ROWS = 2**16


@dataclass(frozen=True)
class Lists:
    """The nearest rows of each of N rows.

    Attributes:
        keys: (N,) sha256 of an item's id and vector; all differ.
        indices: (N, m) int32 row numbers, best first; -1 where the list is no longer certain.
        scores: (N, m) float32; -inf there.
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


def neighbours(keys: pa.FixedSizeBinaryArray, vectors: Tensor, k: int, earlier: Lists | None) -> tuple[Lists, int]:
    """Return lists whose first k entries are those of `knn(vectors, k)` to the bit, and how many rows were searched.

    Args:
        keys: (N,) of the rows, see `keys_of`.
        vectors: (N, d) float32, on the device that searches.
        k: neighbours per row, itself included.
        earlier: lists of rows that may be there still, of the same k.

    Raises:
        ValueError: fewer than k rows.
    """
    n, width = len(vectors), min(len(vectors), k + SPARE)
    if earlier is not None and width == earlier.indices.shape[1] == k + SPARE:
        there = pc.fill_null(pc.index_in(earlier.keys, value_set=keys), -1).to_numpy().astype(np.int64)
        stay = np.flatnonzero(there >= 0)
        rows = there[stay]
        new = np.setdiff1d(np.arange(n), rows)
        indices, scores = _renumbered(earlier, stay, there)
        kept = (indices >= 0).sum(axis=1) >= k
        searched = n - int(kept.sum())
        if searched * n + (n - searched) * len(new) <= WORTHWHILE * n * n:
            return _updated(keys, vectors, rows[kept], new, indices[kept], scores[kept]), searched
    found, values = knn(vectors, width)
    return Lists(keys, found.cpu().numpy().astype(np.int32), values.cpu().numpy()), n


def _renumbered(earlier: Lists, stay: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lists (S, m) of the rows that stay, by new numbers, -1 and -inf for what is gone or not certain."""
    lists, scores = earlier.indices[stay], earlier.scores[stay]
    certain = lists >= 0
    if (np.diff(there[stay]) < 0).any():
        # Equal scores stand by number: with others, a row that was left out may come before one of equal score.
        least = np.where(certain, scores, np.inf).min(axis=1, keepdims=True)
        certain &= scores > least
    indices = np.where(certain, there[lists], -1)
    return indices, np.where(indices >= 0, scores, -np.inf).astype(np.float32)


def _updated(
    keys: pa.FixedSizeBinaryArray,
    vectors: Tensor,
    rows: np.ndarray,
    new: np.ndarray,
    old: np.ndarray,
    known: np.ndarray,
) -> Lists:
    """Return the lists of all rows: those of `rows` (S,) from their old (S, m) lists and `new` (A,), others by search."""
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
        # Down to the last old entry: below it, what the old list left out may stand between.
        last = both.shape[1] - 1 - was[:, ::-1].argmax(axis=1)
        certain = np.arange(width) <= last[:, None]
        indices[rows[part]] = np.where(certain, both[:, :width], -1)
        scores[rows[part]] = np.where(certain, values[:, :width], -np.inf)
    return Lists(keys, indices, scores)


def kept_path(output: Path) -> Path:
    """Return where the lists behind a graph are stored: hidden beside it, for Snakemake deletes a job's outputs first."""
    return output.parent / FOLDER / output.name


def read_lists(path: Path, code: str) -> Lists | None:
    """Return stored lists; None where there are none, or they are of other code or damaged."""
    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
        if (table.schema.metadata or {}).get(b"code") != code.encode():
            return None
        columns = [table.column(name).combine_chunks() for name in ("indices", "scores")]
        indices, scores = (c.flatten().to_numpy().reshape(-1, c.type.list_size) for c in columns)
        return Lists(table.column("key").combine_chunks(), indices, scores)
    except FileNotFoundError:
        return None
    except (OSError, KeyError, pa.ArrowException) as error:
        log.warning("%s cannot be read (%s); all neighbours are searched", path, error)
        return None


def write_lists(path: Path, lists: Lists, code: str) -> None:
    """Store lists for the next time, atomically."""
    width = lists.indices.shape[1]
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
        for values in (lists.indices, lists.scores)
    ]
    table = pa.table([lists.keys, *columns], names=["key", "indices", "scores"])
    with atomic(path) as temporary:
        pq.write_table(
            table.replace_schema_metadata({"code": code}),
            temporary,
            compression="zstd",
            use_dictionary=False,
            write_page_checksum=True,
        )
