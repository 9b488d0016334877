"""Groups of test users by the columns of the dataset's users' table."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cm3.common.errors import UserError
from cm3.common.tables import CATEGORY, read_metadata, read_table
from cm3.datasets.grouping import OTHER, UNKNOWN
from cm3.datasets.user_groups import GROUPS

FEWEST_USERS = 20
"""Fewest test users of a group that counts in a gap: the mean over fewer is mostly chance."""


@dataclass(frozen=True)
class UserGroup:
    """A group of test users with one value, or one range of values, in a column.

    Attributes:
        column: name of the column.
        name, definition: for readers.
        mask: (R,) which of the test users are in it; at least one is.
    """

    column: str
    name: str
    definition: str
    mask: np.ndarray


def read_user_groups(path: str | os.PathLike[str], users: np.ndarray, n_users: int) -> list[UserGroup]:
    """Return the groups of (R,) test users by each column of user_groups.parquet, in the order of the file.

    Raises:
        UserError: absent, unreadable, or of another number of users than `n_users`.
    """
    about = read_metadata(path).get(GROUPS, [])
    table = read_table(path, pa.schema([("user", pa.int32()), *((facts["column"], CATEGORY) for facts in about)]))
    if len(table) != n_users:
        raise UserError(f"{path}: has {len(table)} users, the dataset {n_users}; delete it and run again")
    groups = []
    for facts in about:
        column = facts["column"]
        labels = table.column(column).cast(pa.string()).to_numpy()[users]
        for name in facts["groups"]:
            mask = labels == name
            if mask.any():
                groups.append(UserGroup(column, name, _definition(column, name, facts), mask))
    return groups


def compared_groups(groups: Sequence[UserGroup]) -> Mapping[str, list[np.ndarray]]:
    """Return by column the masks of the groups that count in its gap: of known values and `FEWEST_USERS` users or more."""
    found: dict[str, list[np.ndarray]] = {group.column: [] for group in groups}
    for group in groups:
        if group.name != UNKNOWN and group.mask.sum() >= FEWEST_USERS:
            found[group.column].append(group.mask)
    return found


def _definition(column: str, name: str, facts: Mapping[str, Any]) -> str:
    if name == UNKNOWN:
        return f"test users whose {column} is not known"
    if facts["cut"] == "largest" and name == OTHER:
        kept = len(set(facts["groups"]) - {OTHER, UNKNOWN})
        return f"test users with one of the {facts['values'] - kept} less frequent values of {column}"
    cut = ", cut at the quartiles of all users" if facts["cut"] == "quartiles" else ""
    return f"test users with {column} {name}{cut}"
