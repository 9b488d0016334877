"""Interactions by split as sparse matrices, checked against the user and item tables."""

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from cm3.common.errors import UserError
from cm3.common.tables import INTERACTIONS, ITEMS, SPLITS, USERS, read_table

LEARNT_FROM = "interactions"
"""Key in the metadata of a model and its embeddings: `Interactions.digest` of what it learnt from."""


@dataclass(frozen=True)
class Interactions:
    """The interactions of a prepared data set, in row order.

    Attributes:
        users, items: (E,) int64 indices.
        split: (E,) int8, positions in `cm3.common.tables.SPLITS`.
        user_ids, item_ids: the ids of the U users and I items.
    """

    users: np.ndarray
    items: np.ndarray
    split: np.ndarray
    user_ids: list[str]
    item_ids: list[str]

    @functools.cached_property
    def digest(self) -> str:
        """Sha256 of the ids, and of the training and validation rows in order: what a model learns from."""
        digest = hashlib.sha256()
        for ids in (self.user_ids, self.item_ids):
            digest.update("\n".join([*ids, ""]).encode())
        learnt = self.split != SPLITS.index("test")
        for values, kind in ((self.users, "<i8"), (self.items, "<i8"), (self.split, "<i1")):
            digest.update(np.ascontiguousarray(values[learnt], kind).tobytes())
        return digest.hexdigest()

    def without_rows(self) -> "Interactions":
        """Return the ids with the digest of these interactions, and no interaction."""
        found = replace(self, users=self.users[:0].copy(), items=self.items[:0].copy(), split=self.split[:0].copy())
        vars(found)["digest"] = self.digest
        return found

    def check_learnt_from(self, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
        """Compare the interactions that a model learnt from with these.

        Files of release 0.1.0 do not name them, and pass.

        Args:
            path: a file of the model, for the message.
            metadata: of that file, with the digest under `interactions`.

        Raises:
            UserError: the model learnt from other interactions, or from the same ones in another split.
        """
        if metadata.get(LEARNT_FROM) not in (None, self.digest):
            raise UserError(
                f"{path}: was trained on other interactions, or on another split of them, than those that it is measured on; "
                "train again"
            )

    def pairs(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the user and item indices of a split's rows, repeats included."""
        mine = self.split == SPLITS.index(split)
        return self.users[mine], self.items[mine]

    def matrix(self, *splits: str) -> sp.csr_matrix:
        """Return the (U, I) matrix that holds 1 for each distinct pair of the splits; columns sorted in each row."""
        pairs = [self.pairs(split) for split in splits]
        users = np.concatenate([users for users, _ in pairs])
        items = np.concatenate([items for _, items in pairs])
        shape = (len(self.user_ids), len(self.item_ids))
        matrix = sp.csr_matrix((np.ones(len(users), np.float32), (users, items)), shape)
        matrix.sum_duplicates()
        matrix.data[:] = 1.0
        return matrix

    def truth(self, split: str) -> sp.csr_matrix:
        """Return `matrix(split)` of the users that have a training interaction; the rows of others are empty."""
        known = np.zeros(len(self.user_ids), np.float32)
        known[self.pairs("train")[0]] = 1
        kept = sp.csr_matrix(sp.diags_array(known) @ self.matrix(split))
        kept.eliminate_zeros()
        return kept


def read_interactions(
    interactions: str | os.PathLike[str], items: str | os.PathLike[str], users: str | os.PathLike[str]
) -> Interactions:
    """Read the three tables of a prepared data set.

    Raises:
        UserError: a table is unreadable, an index has no row in its table, a row has no split, or none is train.
    """
    item_ids = read_table(items, ITEMS, ["item_id"]).column("item_id").to_pylist()
    user_ids = read_table(users, USERS, ["user_id"]).column("user_id").to_pylist()
    table = read_table(interactions, INTERACTIONS, ["user", "item", "split"])
    indices = []
    for name, ids, source in (("user", user_ids, users), ("item", item_ids, items)):
        column = table.column(name)
        if column.null_count:
            raise UserError(f"{interactions}: {column.null_count} rows have no {name}; prepare the data again")
        index = column.to_numpy().astype(np.int64)
        wrong = np.flatnonzero((index < 0) | (index >= len(ids)))
        if len(wrong):
            raise UserError(
                f"{interactions}: row {wrong[0]} has {name} {index[wrong[0]]}, but {source} has {len(ids)} rows "
                f"({len(wrong)} such rows); prepare the data again"
            )
        indices.append(index)
    labels = _positions(table.column("split"))
    if (labels < 0).any():
        row = int(np.flatnonzero(labels < 0)[0])
        raise UserError(
            f"{interactions}: row {row} has split {table.column('split')[row].as_py()!r}, not one of {SPLITS}"
        )
    if not (labels == SPLITS.index("train")).any():
        raise UserError(
            f"{interactions}: no row is in the train split; check the split settings and prepare the data again"
        )
    return Interactions(indices[0], indices[1], labels, user_ids, item_ids)


def _positions(column: pa.ChunkedArray) -> np.ndarray:
    """Return the position in SPLITS of each value of a dictionary column, int8; -1 for others."""
    values = column.combine_chunks()
    places = pc.fill_null(pc.index_in(values.dictionary, value_set=pa.array(SPLITS)), -1).to_numpy()
    found: np.ndarray = np.append(places, -1).astype(np.int8)[pc.fill_null(values.indices, len(places)).to_numpy()]
    return found
