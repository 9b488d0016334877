"""External lists: recommendations of another tool, read from its file and ranked like those of a model."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from cm3.common.errors import UserError
from cm3.common.files import read_json, sha256_of
from cm3.common.interactions import Interactions
from cm3.common.strict import validate
from cm3.common.tables import RUN_RECOMMENDATIONS
from cm3.datasets.files.columns import parse_ids, parse_numbers
from cm3.datasets.files.tabular import Columns, column_names, read_columns
from cm3.evaluation.external_config import External
from cm3.evaluation.hits import hit_matrix
from cm3.evaluation.ranking import Ranking
from cm3.evaluation.recommendations import has_numbers, ids_of, read_recommendations

log = logging.getLogger(__name__)

USER_COLUMNS = ("user", "user_id", "userID")
ITEM_COLUMNS = ("item", "item_id", "itemID")
BLOCK_ENTRIES = 2**22
"""Entries of the lists that are filtered together."""


@dataclass(frozen=True)
class Order:
    """The columns of a file of lists.

    Attributes:
        user, item: columns of ids.
        by: column of ranks or scores.
        rising: lower values come first, as ranks do.
    """

    user: str
    item: str
    by: str
    rising: bool


@dataclass(frozen=True)
class ExternalLists:
    """Recommended items of every user in order, before any are masked.

    Attributes:
        offsets: (U + 1,) the list of user u is at offsets[u] to offsets[u + 1].
        items, scores: (N,) of all lists, best first; of ranks, the score is minus the rank.
        counts: of rows, of users with a list, and of rows left out because their user or item is unknown.
    """

    offsets: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    counts: dict[str, int]

    def __call__(self, ranking: Ranking, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (items, scores) of the first k items of each user without the masked ones, as `Ranking.top_by` does."""
        users = ranking.users.cpu().numpy()
        shape = (len(users), ranking.n_items)
        columns = ranking.columns.cpu().numpy()
        masked = sp.csr_matrix((np.ones(len(columns), bool), columns, ranking.offsets), shape)
        items = np.full((len(users), k), -1, np.int64)
        scores = np.full((len(users), k), -np.inf, np.float32)
        for rows in self._blocks(users, np.diff(ranking.offsets), k):
            found, values = self._unmasked(users[rows], masked[rows], k)
            items[rows, : found.shape[1]], scores[rows, : found.shape[1]] = found, values
        return items, scores

    def lengths(self, users: np.ndarray, masked: sp.csr_matrix) -> np.ndarray:
        """Return how many items the lists of users (R,) have without their items in `masked` (U, I)."""
        lists = sp.csr_matrix((np.ones(len(self.items), np.int8), self.items, self.offsets), masked.shape)
        removed = np.diff(lists[users].multiply(masked[users]).tocsr().indptr)
        lengths: np.ndarray = np.diff(self.offsets)[users] - removed
        return lengths

    def check_lengths(self, users: np.ndarray, masked: sp.csr_matrix, ks: Sequence[int], path: Path) -> dict[str, int]:
        """Warn about users whose lists are too short, and return how many there are.

        Args:
            users: (R,) the users whose lists are measured.
            masked: (U, I) the items that are left out of their lists.
            ks: cut-offs of the metrics.
            path: the file, for the message.
        """
        lengths, found = self.lengths(users, masked), {}
        missing = int((lengths == 0).sum())
        if missing:
            log.warning("%s: has no item for %d of %d users; their metrics are 0", path, missing, len(users))
        for k in ks:
            found[f"shorter_than_{k}"] = short = int((lengths < k).sum())
            if short:
                log.warning(
                    "%s: %d of %d users have fewer than %d items, the shortest list %d; ranks after its end have no hits. "
                    "Training items are left out: write longer lists",
                    *(path, short, len(users), k, lengths.min()),
                )
        return {"masked": int((np.diff(self.offsets)[users] - lengths).sum()), "without_items": missing, **found}

    def _blocks(self, users: np.ndarray, n_masked: np.ndarray, k: int) -> Iterator[slice]:
        width = np.minimum(np.diff(self.offsets)[users], k + n_masked)
        start = 0
        while start < len(users):
            widest = np.maximum.accumulate(width[start : start + BLOCK_ENTRIES])
            entries = widest * np.arange(1, len(widest) + 1)
            stop = start + max(1, int(np.searchsorted(entries, BLOCK_ENTRIES, "right")))
            yield slice(start, stop)
            start = stop

    def _unmasked(self, users: np.ndarray, masked: sp.csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
        starts, lengths = self.offsets[users], np.diff(self.offsets)[users]
        width = int(np.minimum(lengths, k + np.diff(masked.indptr)).max(initial=0))
        there = np.arange(width) < lengths[:, None]
        at = np.where(there, starts[:, None] + np.arange(width), 0)
        items = np.where(there, self.items[at] if len(self.items) else -1, -1).astype(np.int64)
        kept = there & ~hit_matrix(items, masked)
        order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        items, at, kept = (np.take_along_axis(each, order, 1) for each in (items, at, kept))
        scores = self.scores[at] if len(self.scores) else np.zeros(at.shape, np.float32)
        return np.where(kept, items, -1), np.where(kept, scores, -np.inf)


def read_lists(spec: External, data: Interactions, path: Path) -> ExternalLists:
    """Read the lists of a file. Rows of users or items that the dataset lacks are left out, with a warning.

    Equal scores of a user are ordered like those of a model: the lower item first. The recommendations of a run of this
    workflow, which have numbers in place of ids, are read, too.

    Args:
        spec: the columns and the format.
        data: users and items of the dataset.
        path: the file.

    Raises:
        UserError: with the row or the ids: an unreadable file, no such column, a missing id, a rank or score that is not a
            number, an item or a rank that a user has twice, or a file without any user or item of the dataset.
    """
    format = spec.resolved_format
    present = column_names(path, format)
    columns = _order(spec, path, present)
    if list(present) == RUN_RECOMMENDATIONS.names and has_numbers(path):
        users, items, by = _rows_of_run(columns, data, path)
        counts = {"rows": len(users)} | dict.fromkeys(("unknown_user_rows", "unknown_item_rows"), 0)
    else:
        users, items, by, counts = _rows(columns, format, data, path)
    falling = by if columns.rising else -by
    order = np.lexsort((items, falling, users))
    users, items, falling = users[order], items[order], falling[order]
    _check_items(users, items, data, path)
    if columns.rising:
        _check_ranks(users, falling, data, path, columns.by)
    offsets = np.searchsorted(users, np.arange(len(data.user_ids) + 1))
    counts = {"rows": counts["rows"], "users": int((np.diff(offsets) > 0).sum()), **counts}
    log.info("%s: %d recommendations for %d of %d users", path, len(items), counts["users"], len(data.user_ids))
    return ExternalLists(offsets, items.astype(np.int32), (-falling).astype(np.float32), counts)


def _rows_of_run(columns: Order, data: Interactions, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return users, items and ranks or scores (N,) of a run of this workflow, which has numbers in place of ids."""
    parts = list(read_recommendations(path, ids_of(data.user_ids, data.item_ids), [columns.by]))
    users, items, by = (np.concatenate(column) for column in zip(*parts, strict=True))
    return users.astype(np.int64), items.astype(np.int64), by.astype(np.float64)


def _rows(
    columns: Order, format: str, data: Interactions, path: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
    """Return users, items and ranks or scores (N,) of the rows whose ids the dataset has, and counts of rows."""
    names = [columns.user, columns.item, columns.by]
    ids = {
        "users": pa.array(data.user_ids, pa.large_string()),
        "items": pa.array(data.item_ids, pa.large_string()),
    }
    unknown = {"users": Unknown("users", path), "items": Unknown("items", path)}
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    rows = 0
    for part in read_columns(path, format, names, names[:2]):
        users = unknown["users"].indices(part, columns.user, ids["users"])
        items = unknown["items"].indices(part, columns.item, ids["items"])
        by = parse_numbers(part, columns.by)
        known = (users >= 0) & (items >= 0)
        parts.append((users[known], items[known], by[known]))
        rows += len(users)
    for kind, one in unknown.items():
        one.report(rows, ids[kind])
    users, items, by = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not len(users):
        raise UserError(f"{path}: no row has both a user and an item of the dataset; write the ids of the dataset")
    counts = {
        "rows": rows,
        "unknown_user_rows": unknown["users"].rows,
        "unknown_item_rows": unknown["items"].rows,
    }
    return users, items, by, counts


def _order(spec: External, path: Path, present: Sequence[str]) -> Order:
    def first(given: str | None, key: str, usual: Sequence[str]) -> str:
        if given is not None:
            return given
        for name in usual:
            if name in present:
                return name
        raise UserError(
            f"{path}: has none of the columns {', '.join(usual)}, only {', '.join(present)}; set model.{key} of the experiment"
        )

    user = first(spec.user_column, "user_column", USER_COLUMNS)
    item = first(spec.item_column, "item_column", ITEM_COLUMNS)
    if spec.score_column is not None:
        return Order(user, item, spec.score_column, rising=False)
    by = first(spec.rank_column, "rank_column or model.score_column", ("rank", "score"))
    return Order(user, item, by, rising=spec.rank_column is not None or by == "rank")


class Unknown:
    """Ids of a file that the dataset lacks.

    Attributes:
        rows: number of rows with such an id.
        known: number of rows with an id of the dataset.
        example: one such id.
    """

    def __init__(self, kind: str, path: Path) -> None:
        self.kind, self.path = kind, path
        self.rows = self.known = 0
        self.example = ""

    def indices(self, part: Columns, column: str, ids: pa.Array) -> np.ndarray:
        """Return the position of each id of a column in `ids`, int64; -1 for those that are not in it."""
        values = parse_ids(part, column, "recommendation").cast(pa.large_string())
        place = pc.index_in(values, value_set=ids)
        if place.null_count and not self.rows:
            self.example = values.filter(pc.is_null(place))[0].as_py()
        self.rows += place.null_count
        self.known += len(place) - place.null_count
        found: np.ndarray = pc.fill_null(place, -1).to_numpy().astype(np.int64)
        return found

    def report(self, rows: int, ids: pa.Array) -> None:
        """Warn about unknown ids.

        Raises:
            UserError: no id is known.
        """
        if not self.known:
            raise UserError(
                f"{self.path}: none of its {self.kind} is in the dataset; they are like {self.example!r}, those of the dataset "
                f"like {ids[0].as_py()!r}. Write the original ids (docs/mmrec.md shows how to map numbers to ids)"
            )
        if self.rows:
            log.warning(
                "%s: %d of %d rows name %s that the dataset lacks, such as %r; they are left out",
                *(self.path, self.rows, rows, self.kind, self.example),
            )


def _check_items(users: np.ndarray, items: np.ndarray, data: Interactions, path: Path) -> None:
    keys = np.sort(users * len(data.item_ids) + items)
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        user, item = divmod(int(keys[twice[0]]), len(data.item_ids))
        raise UserError(
            f"{path}: user {data.user_ids[user]!r} has item {data.item_ids[item]!r} twice ({len(twice)} such rows); give each "
            "item once"
        )


def _check_ranks(users: np.ndarray, ranks: np.ndarray, data: Interactions, path: Path, column: str) -> None:
    same = np.flatnonzero((users[1:] == users[:-1]) & (ranks[1:] == ranks[:-1]))
    if len(same):
        row = int(same[0])
        raise UserError(
            f"{path}: user {data.user_ids[users[row]]!r} has two items at {column} {ranks[row]:g} ({len(same)} such rows); "
            "give each rank of a user once, or set model.score_column to order by scores"
        )


def read_external(checked: Path, path: Path, data: Interactions) -> ExternalLists:
    """Return the lists of a file that the stage `cm3.evaluation.external_stage` has checked.

    Args:
        checked: the stage's output.
        path: the file of the lists.
        data: users and items of the dataset.

    Raises:
        UserError: as `read_lists`; or the file has changed since it was checked.
    """
    stored = read_json(checked)
    if sha256_of(path) != stored["sha256"]:
        raise UserError(f"{path}: has changed since it was checked; run the same command again")
    spec = validate(External, stored["model"] | {"recommendations": str(path)}, "model")
    return read_lists(spec, data, path)
