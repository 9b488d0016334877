"""Slices: metrics by item popularity and by user history, from recommendation lists and interactions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from cm3.evaluation.metrics import of_hits
from cm3.reports.analysis.user_groups import UserGroup

ITEM_CLASSES = ("head", "middle", "tail", "cold")
_BLOCK_PAIRS, _BLOCK_USERS = 65_536, 8192
_BY = "users by "
HEAD_SHARE, HEAD_AND_MIDDLE_SHARE = 0.2, 0.8
_DEFINITIONS = {
    "head": "the most popular items that make up the first 20 % of its interactions",
    "middle": "the items after the head, up to 80 % of the training interactions",
    "tail": "the items with the last 20 % of the training interactions",
    "cold": "items without training interactions",
}


@dataclass(frozen=True)
class Slice:
    """A part of the test split.

    Attributes:
        kind: items, if only some test items count; users, if only some users do; `kind_of(column)` of groups by a column.
        name, definition: for readers.
        users, interactions: numbers of test users and test interactions.
        items: number of items; None for users.
    """

    kind: str
    name: str
    definition: str
    users: int
    interactions: int
    items: int | None


def kind_of(column: str) -> str:
    """Return the kind of the slices of the groups of users by a column of the users' table."""
    return f"{_BY}{column}"


def column_of(kind: str) -> str:
    """Return the column of the users' table that a kind of slices is by; empty for the other kinds."""
    return kind.removeprefix(_BY) if kind.startswith(_BY) else ""


def item_classes(counts: np.ndarray) -> np.ndarray:
    """Return each item's class, (I,) positions in ITEM_CLASSES, from (I,) numbers of training interactions.

    Items are sorted by descending count, ties by item index. An item is head if the items before it have less than
    20 % of the interactions, else middle if they have less than 80 %, else tail; without interactions it is cold.
    """
    order = np.lexsort((np.arange(len(counts)), -counts))
    before = np.cumsum(counts[order]) - counts[order]
    # Integer arithmetic, because 0.2 is not exact in floating point.
    classes = np.where(5 * before < counts.sum(), 0, np.where(5 * before < 4 * counts.sum(), 1, 2))
    result = np.empty(len(counts), np.int64)
    result[order] = np.where(counts[order] == 0, 3, classes)
    return result


def history_bins(lengths: np.ndarray, shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0)) -> list[tuple[str, np.ndarray]]:
    """Split (R,) test users by quantiles of their number of training items, by default quartiles: names and (R,) masks.

    Quantiles are observed lengths and users of equal length stay together, so there are at most as many bins as `shares`.
    Users without training items are not tested.
    """
    bins = []
    below = 0
    for edge in np.unique(np.quantile(lengths, shares, method="inverted_cdf")):
        mask = (lengths > below) & (lengths <= edge)
        shortest, longest = int(lengths[mask].min()), int(edge)
        name = f"{shortest}-{longest} items" if shortest < longest else f"{longest} item{'s' if longest > 1 else ''}"
        bins.append((name, mask))
        below = longest
    return bins


class Slices:
    """The slices of one test split, to evaluate the lists of many models."""

    def __init__(
        self,
        users: np.ndarray,
        train: sp.csr_matrix,
        test: sp.csr_matrix,
        cutoffs: Sequence[int],
        groups: Sequence[UserGroup] = (),
    ) -> None:
        """Take the (R,) test users, their groups, the (U, I) training and test matrices, and the cut-offs of the metrics."""
        self.truth, self.cutoffs = test[users], list(cutoffs)
        self.rows = np.repeat(np.arange(len(users)), np.diff(self.truth.indptr))
        counts = np.asarray(train.sum(0)).ravel().astype(np.int64)
        self.classes = item_classes(counts)
        self.n_truth = np.column_stack(
            [
                np.asarray(self.truth[:, self.classes == c].sum(1)).ravel().astype(np.int64)
                for c in range(len(ITEM_CLASSES))
            ]
        )
        total = self.n_truth.sum(1)
        bins = history_bins(np.diff(train.indptr)[users])
        masks = (*(self.n_truth > 0).T, *(mask for _, mask in bins), *(group.mask for group in groups))
        self.members = [np.flatnonzero(mask) for mask in masks]
        self.slices = [
            Slice(
                "items",
                name,
                _DEFINITIONS[name],
                int((self.n_truth[:, c] > 0).sum()),
                int(self.n_truth[:, c].sum()),
                int((self.classes == c).sum()),
            )
            for c, name in enumerate(ITEM_CLASSES)
        ]
        self.slices += [
            Slice("users", name, f"test users with {name} in training", int(mask.sum()), int(total[mask].sum()), None)
            for name, mask in bins
        ]
        self.slices += [
            Slice(
                kind_of(group.column),
                group.name,
                group.definition,
                int(group.mask.sum()),
                int(total[group.mask].sum()),
                None,
            )
            for group in groups
        ]

    def measure(self, lists: np.ndarray) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
        """Return the per-user metrics of (R, k) lists, and for each of `slices` the means over its users.

        In a slice of items, only hits and test items of the slice count, and users without such test items are skipped.
        A slice without users has no means. Cut-offs above k are skipped.
        """
        rows, ranks, classes = self._hits(lists)
        counted = [(classes >= 0, self.n_truth.sum(1))]
        counted += [(classes == c, self.n_truth[:, c]) for c in range(len(ITEM_CLASSES))]
        overall, *found = (self._values(rows[hit], ranks[hit], n_truth, lists.shape[1]) for hit, n_truth in counted)
        found += [overall] * (len(self.members) - len(found))
        means = [
            {metric: float(value[users].mean()) for metric, value in values.items()} if len(users) else {}
            for users, values in zip(self.members, found, strict=True)
        ]
        return overall, means

    def _hits(self, lists: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # Row, rank and item class of each hit: search the few test items in the many recommendations.
        hits = []
        for start in range(0, len(self.rows), _BLOCK_PAIRS):
            part = slice(start, start + _BLOCK_PAIRS)
            rows, items = self.rows[part], self.truth.indices[part]
            pair, rank = np.nonzero(lists[rows] == items[:, None])
            hits.append((rows[pair], rank, self.classes[items[pair]]))
        rows, ranks, classes = (np.concatenate(column) for column in zip(*hits, strict=True))
        return rows, ranks, classes

    def _values(self, rows: np.ndarray, ranks: np.ndarray, n_truth: np.ndarray, k: int) -> dict[str, np.ndarray]:
        # Most users have no hit: all their values are 0.
        users, place = np.unique(rows, return_inverse=True)
        hits = np.zeros((len(users), k), bool)
        hits[place, ranks] = True
        cutoffs = [cutoff for cutoff in self.cutoffs if cutoff <= k]
        parts = np.array_split(np.arange(len(users)), len(users) // _BLOCK_USERS + 1)
        found = [of_hits(hits[part], n_truth[users[part]], cutoffs) for part in parts]
        values = {metric: np.zeros(len(n_truth)) for metric in found[0]}
        for metric, value in values.items():
            value[users] = np.concatenate([part[metric] for part in found])
        return values
