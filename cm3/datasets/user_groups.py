"""Stage: users' table -> user_groups.parquet, the group of each user of the dataset by each column that the config names.

Users whose value is missing, and users without a row, are in the group `unknown`. Of the values only those are written that
name a group (`cm3.datasets.grouping`).
"""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cm3.common.cli import stage
from cm3.common.errors import UserError
from cm3.common.tables import CATEGORY, MADE_FROM, USERS, read_table, write_table
from cm3.datasets.grouping import UNKNOWN, Grouping, group_values
from cm3.datasets.raw_files import provenance
from cm3.datasets.registry import source_spec

log = logging.getLogger("cm3.datasets.user_groups")

GROUPS = "groups"
"""Key in the metadata of the table: of each `column` its `cut` (values, largest or quartiles), number of `values`, `groups`."""

PlaceOf = Callable[[int], str]
"""From a row of a part of a table to "path, line N"."""


@dataclass(frozen=True)
class KnownRows:
    """The rows of a users' table whose users are in the dataset.

    Attributes:
        table: `user` (its number) and the columns of groups, as text.
        places: (N, 2) number of the part of each row, and row in that.
        parts: by number.
        n_read: number of all rows, with those of other users.
        example: the first id of the file.
    """

    table: pa.Table
    places: np.ndarray
    parts: Sequence[PlaceOf]
    n_read: int
    example: str

    def place(self, row: int) -> str:
        """Return "path, line N" of a row."""
        part, row_in_part = map(int, self.places[row])
        return self.parts[part](row_in_part)


def group_users(
    spec: Mapping[str, Any],
    inputs: Mapping[str, Path],
    users: Path,
    output: Path,
    made_from: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the groups of all users of a dataset.

    Args:
        spec: a dataset's user_groups_spec().
        inputs: its user_groups_inputs().
        users: the table of the prepare stage.
        output: file to write: `user`, and a column of groups for each of `columns.groups`, a row for each user in order.
        made_from: keys of the settings by stage, for the metadata of the table.

    Returns:
        number of users, of those in the users' table, and by column the number of users in each group.

    Raises:
        UserError: malformed input, two rows of a user with different values, no row with a user of the dataset, or a column
            of text with nearly as many values as users.
    """
    path = next(iter(inputs.values()))
    ids = read_table(users, USERS, ["user_id"]).column("user_id").combine_chunks()
    rows = _read_known(spec, inputs, ids)
    if not len(rows.table):
        raise UserError(
            f"{path}: none of its {rows.n_read} rows has the id of a user of the dataset; its ids are like {rows.example!r}, "
            f"those of the dataset like {ids[0].as_py()!r}: write them alike, or correct the column of ids"
        )
    table = _one_row_each(rows, ids)
    log.info("%s: has %d of the %d users of the dataset", path, len(table), len(ids))
    groupings = {name: _grouping(path, name, table, len(ids)) for name in spec["columns"]["groups"]}
    _write(output, groupings, len(ids), made_from)
    return {
        "users": len(ids),
        "in_table": len(table),
        "groups": {name: one.sizes() for name, one in groupings.items()},
    }


def _read_known(spec: Mapping[str, Any], inputs: Mapping[str, Path], ids: pa.Array) -> KnownRows:
    module, _, name = source_spec(spec["source"]).user_reader.partition(":")
    read = getattr(importlib.import_module(module), name)
    tables: list[pa.Table] = []
    places: list[np.ndarray] = []
    parts: list[PlaceOf] = []
    n_read, example = 0, ""
    for place, table in read(dict(spec), dict(inputs)):
        user = pc.index_in(table["user"], value_set=ids)
        known = np.flatnonzero(user.is_valid().to_numpy())
        tables.append(table.set_column(0, "user", user).take(pa.array(known)))
        places.append(np.column_stack([np.full(len(known), len(parts)), known]))
        parts.append(place)
        example = example or next(iter(table["user"].slice(0, 1).to_pylist()), "")
        n_read += len(table)
    return KnownRows(pa.concat_tables(tables), np.concatenate(places), parts, n_read, example)


def _one_row_each(rows: KnownRows, ids: pa.Array) -> pa.Table:
    """Return the first row of each user. Raises UserError for two rows of a user with different values."""
    user = rows.table["user"].to_numpy()
    order = np.argsort(user, kind="stable")
    again = np.diff(user[order], prepend=-1) == 0
    for name in rows.table.column_names[1:]:
        column = rows.table[name].combine_chunks()
        codes = pc.fill_null(column.dictionary_encode().indices, -1).to_numpy()[order]
        different = np.flatnonzero(again & (np.diff(codes, prepend=-1) != 0))
        if len(different):
            first, second = order[different[0] - 1 : different[0] + 1].tolist()
            raise UserError(
                f"{rows.place(second)}: user {ids[int(user[second])].as_py()!r} has {name} = {column[second].as_py()!r}, but "
                f"{column[first].as_py()!r} in {rows.place(first)}; keep one row per user"
            )
    return rows.table.take(pa.array(order[~again]))


def _grouping(path: Path, name: str, table: pa.Table, n_users: int) -> Grouping:
    values: list[str | None] = [None] * n_users
    for user, value in zip(table["user"].to_pylist(), table[name].to_pylist(), strict=True):
        values[user] = value
    try:
        found = group_values(values)
    except ValueError as error:
        raise UserError(f"{path}: column {name!r} {error}") from None
    log.info("users by %s: %s", name, ", ".join(f"{group} {count}" for group, count in found.sizes().items()))
    if list(found.names) == [UNKNOWN]:
        log.warning("%s: column %r has no value for any user of the dataset", path, name)
    return found


def _write(output: Path, groupings: Mapping[str, Grouping], n_users: int, made_from: Mapping[str, str] | None) -> None:
    schema = pa.schema([("user", pa.int32()), *((name, CATEGORY) for name in groupings)])
    columns = {
        name: pa.DictionaryArray.from_arrays(pa.array(one.group), pa.array(list(one.names), pa.string()))
        for name, one in groupings.items()
    }
    about = [
        {"column": name, "cut": one.cut, "values": one.values, "groups": list(one.names)}
        for name, one in groupings.items()
    ]
    metadata: dict[str, Any] = {GROUPS: about} | ({MADE_FROM: dict(made_from)} if made_from else {})
    write_table(output, pa.table({"user": pa.array(range(n_users), pa.int32()), **columns}), schema, metadata)


def main() -> None:
    """Spec: a dataset's user_groups_spec(). Inputs: its user_groups_inputs(), and users. Outputs: user_groups, record."""
    with stage("cm3.datasets.user_groups") as call:
        inputs = {name: path for name, path in call.inputs.items() if name != "users"}
        call.record["raw"] = provenance(inputs, {})
        output = call.outputs["user_groups"]
        call.record |= group_users(call.spec, inputs, call.inputs["users"], output, call.made_from)


if __name__ == "__main__":
    main()
