"""Results of an evaluation: ranked lists and metrics of each user, and the table of the metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from cm3.common.tables import write_table
from cm3.evaluation.hits import hit_matrix


@dataclass(frozen=True)
class RankedLists:
    """The best items of users (R,), in ascending order of users, without their training items.

    Attributes:
        users: indices (R,).
        items, scores: (R, L), best first; -1 and -inf after the end of a shorter list.
    """

    users: np.ndarray
    items: np.ndarray
    scores: np.ndarray

    def of(self, users: np.ndarray, length: int, masked: sp.csr_matrix | None = None) -> "RankedLists":
        """Return the lists of some users up to `length`, without their items in `masked` (U, I).

        At most L - length masked items may be in a list.
        """
        rows = np.searchsorted(self.users, users)
        items, scores = self.items[rows], self.scores[rows]
        if masked is not None:
            removed = hit_matrix(items, masked[users])
            order = removed.argsort(axis=1, kind="stable")[:, :length]
            removed, items, scores = (np.take_along_axis(each, order, 1) for each in (removed, items, scores))
            items[removed], scores[removed] = -1, -np.inf
        return RankedLists(users, items[:, :length], scores[:, :length])

    def compact(self) -> "RankedLists":
        """Return a copy that takes half of the memory."""
        return RankedLists(self.users, self.items.astype(np.int32), self.scores.copy())


@dataclass(frozen=True)
class UserMetrics:
    """Metrics of the users that have truth in a split.

    Attributes:
        users: indices (R,).
        n_truth: sizes of their truth, (R,).
        values: (R,) float64 by metric, such as "recall@20".
    """

    users: np.ndarray
    n_truth: np.ndarray
    values: dict[str, np.ndarray]

    @classmethod
    def concatenated(cls, parts: Sequence["UserMetrics"]) -> "UserMetrics":
        """Return the metrics of the users of all parts."""
        values = {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values}
        return cls(np.concatenate([p.users for p in parts]), np.concatenate([p.n_truth for p in parts]), values)

    def means(self) -> dict[str, float]:
        """Return the mean of each metric over the users, in full precision."""
        return {name: float(value.mean()) for name, value in self.values.items()}


def write_per_user(path: Path, found: UserMetrics) -> None:
    """Write per_user.parquet: user, n_test and a float64 column per metric and cut-off."""
    columns = {"user": found.users.astype(np.int32), "n_test": found.n_truth.astype(np.int32), **found.values}
    table = pa.table(columns)
    write_table(path, table, table.schema)
