"""Tables of recommendations: of a run, with numbers of users and items, and published ones, with their ids.

Runs of earlier releases have tables with ids; everything here reads both.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cm3.common.errors import UserError
from cm3.common.tables import (
    ITEMS,
    RECOMMENDATIONS,
    RUN_RECOMMENDATIONS,
    USERS,
    metadata_of,
    open_parquet,
    read_table,
    write_tables,
)

if TYPE_CHECKING:
    from cm3.evaluation.results import RankedLists  # imports torch, which publishing does not need

IDS = "ids"
"""Key in the metadata of a run's table: `Ids.digest` of the tables that its numbers are rows of."""

_BLOCK = 65_536  # ids that are Python strings at a time
_GROUPS = 4  # row groups that are read at a time
# Measured on 200,000 users x 50: half of the size and a third of the time of dictionaries.
_ENCODING = {"use_dictionary": ["user", "rank"], "use_byte_stream_split": ["item", "score"]}


@dataclass(frozen=True)
class Ids:
    """The ids (U,) and (I,) of the users and items of a data set, as text in the order of its tables."""

    users: pa.Array
    items: pa.Array

    @functools.cached_property
    def digest(self) -> str:
        """Sha256 of the ids and their order."""
        digest = hashlib.sha256()
        for ids in (self.users, self.items):
            for start in range(0, len(ids), _BLOCK):
                digest.update(json.dumps(ids.slice(start, _BLOCK).to_pylist()).encode())
            digest.update(b"\n")
        return digest.hexdigest()


def ids_of(user_ids: Sequence[str], item_ids: Sequence[str]) -> Ids:
    """Return the ids of lists of text."""
    return Ids(pa.array(user_ids, pa.string()), pa.array(item_ids, pa.string()))


def read_ids(users: str | os.PathLike[str], items: str | os.PathLike[str]) -> Ids:
    """Return the ids of the user and the item table of a data set."""
    user_ids = read_table(users, USERS, ["user_id"]).column("user_id")
    return Ids(user_ids.combine_chunks(), read_table(items, ITEMS, ["item_id"]).column("item_id").combine_chunks())


def write_recommendations(path: Path, lists: Sequence["RankedLists"], ids: Ids, top_n: int) -> None:
    """Write the table of a run: user, item, rank from 1 and score, a row group per part of the users."""
    ranks = np.arange(1, top_n + 1, dtype=np.int32)

    def tables() -> Iterator[pa.Table]:
        for found in lists:
            items, scores = found.items[:, :top_n], found.scores[:, :top_n]
            present = items >= 0
            columns = {
                "user": np.broadcast_to(found.users[:, None].astype(np.int32), items.shape)[present],
                "item": items[present].astype(np.int32),
                "rank": np.broadcast_to(ranks[: items.shape[1]], items.shape)[present],
                "score": scores[present],
            }
            yield pa.table(columns)

    write_tables(path, tables(), RUN_RECOMMENDATIONS, {IDS: ids.digest}, **_ENCODING)


def has_numbers(path: str | os.PathLike[str]) -> bool:
    """Return whether a Parquet file is a table that `write_recommendations` wrote."""
    with open_parquet(path) as file:
        schema = file.schema_arrow
    return schema.names == RUN_RECOMMENDATIONS.names and IDS.encode() in (schema.metadata or {})


def publish_recommendations(source: Path, target: Path, ids: Ids) -> None:
    """Write the table of a run with ids in place of numbers: user_id, item_id, rank from 1 and score.

    Raises:
        UserError: the numbers are not of these users and items.
    """

    def tables(file: pq.ParquetFile) -> Iterator[pa.Table]:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            user, item = (_checked(table.column(n), known, source) for n, known in _numbered(ids).items())
            columns = [ids.users.take(user), ids.items.take(item), table.column("rank"), table.column("score")]
            yield pa.table(columns, names=RECOMMENDATIONS.names)

    with open_parquet(source) as file:
        _check_ids(file, source, ids)
        write_tables(target, tables(file), RECOMMENDATIONS)


def read_recommendations(
    path: str | os.PathLike[str], ids: Ids, columns: Sequence[str] = ("rank",)
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield users and items (R,), as numbers, and further columns of a few row groups at a time, which bounds the memory.

    Args:
        path: the table of a run, of this or an earlier release, or a published one.
        ids: of the users and items of the data set.
        columns: further columns: rank, score.

    Raises:
        UserError: an unreadable file, a missing column, or users or items that the data set does not have.
    """
    with open_parquet(path) as file:
        numbers = RUN_RECOMMENDATIONS.names[0] in file.schema_arrow.names
        if numbers:
            _check_ids(file, path, ids)
        names = [*(RUN_RECOMMENDATIONS if numbers else RECOMMENDATIONS).names[:2], *columns]
        if absent := [name for name in names if name not in file.schema_arrow.names]:
            raise UserError(f"{path}: has no column {', '.join(absent)}; delete it and run again")
    with open_parquet(path, read_dictionary=[] if numbers else names[:2]) as file:
        for first in range(0, file.num_row_groups, _GROUPS):
            table = file.read_row_groups(range(first, min(first + _GROUPS, file.num_row_groups)), columns=names)
            look_up = _checked if numbers else _codes
            both = zip(names[:2], (ids.users, ids.items), strict=True)
            found = [look_up(table.column(name), known, path) for name, known in both]
            yield *found, *(table.column(name).to_numpy() for name in columns)


def _check_ids(file: pq.ParquetFile, path: str | os.PathLike[str], ids: Ids) -> None:
    if metadata_of(path, file.schema_arrow).get(IDS) != ids.digest:
        raise UserError(
            f"{path}: its numbers are rows of other tables of users and items than those of this data set. Run the same "
            "command again, or take the published recommendations.parquet, which has ids"
        )


def _numbered(ids: Ids) -> dict[str, pa.Array]:
    return dict(zip(RUN_RECOMMENDATIONS.names[:2], (ids.users, ids.items), strict=True))


def _checked(column: pa.ChunkedArray, known: pa.Array, path: str | os.PathLike[str]) -> np.ndarray:
    numbers: np.ndarray = column.to_numpy()
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(known):
        wrong = numbers[(numbers < 0) | (numbers >= len(known))][0]
        raise UserError(f"{path}: {wrong} is not a row of the {len(known)} of the data set; delete it and run again")
    return numbers


def _codes(column: pa.ChunkedArray, known: pa.Array, path: str | os.PathLike[str]) -> np.ndarray:
    # Look up each distinct id once, not every row.
    if not len(column):
        return np.empty(0, np.int32)
    column = column.unify_dictionaries()
    ids = column.chunk(0).dictionary
    place = pc.index_in(ids, value_set=known)
    if place.null_count:
        unknown = ids.filter(pc.is_null(place))[0].as_py()
        raise UserError(f"{path}: {unknown!r} is not an id of the data set; delete it and run again")
    found: np.ndarray = place.to_numpy()[np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])]
    return found
