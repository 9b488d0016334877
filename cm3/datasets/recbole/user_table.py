"""RecBole's .user file: ids, and the columns that users are compared by."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from cm3.common.errors import UserError
from cm3.common.ids import MISSING_TEXTS
from cm3.datasets.reader import MalformedLines
from cm3.datasets.recbole.atomic import USER, Header, read_header, rows
from cm3.datasets.text import is_unicode

_MISSING = frozenset(("", *MISSING_TEXTS))


def read_users(spec: dict[str, Any], inputs: dict[str, Path]) -> Iterator[tuple[Callable[[int], str], pa.Table]]:
    """Yield "path, line N" by row, and a table of `user` and the groups, all text; null is unknown.

    Rows without an id are left out, as in the .item file.

    Args:
        spec: columns (user, and groups), field_separator, malformed.
        inputs: user_table; other columns of it are not read.

    Raises:
        UserError: with the line: a missing column, a column of sequences, too many malformed lines.
    """
    path = inputs["user_table"]
    header = read_header(path, spec["field_separator"])
    key = header.require(spec["columns"]["user"], USER)
    columns = {name: _column(header, name) for name in spec["columns"]["groups"]}
    faults, count = MalformedLines(path, spec["malformed"]), 0
    lines: list[int] = []
    ids: list[str] = []
    values: dict[str, list[str | None]] = {name: [] for name in columns}
    for number, row in rows(path, spec["field_separator"], len(header.names), faults):
        count += 1
        user_id = row[key].strip()
        if user_id in _MISSING or not is_unicode(user_id):
            continue
        lines.append(number)
        ids.append(user_id)
        for name, column in columns.items():
            text = row[column].strip()
            values[name].append(None if text in _MISSING else text)
    if not count and not faults.reasons:
        raise UserError(f"{path}: has no users, only a header")
    faults.check(count + faults.reasons.total())
    texts = {name: pa.array(column, pa.string()) for name, column in values.items()}
    yield lambda row: f"{path}, line {lines[row]}", pa.table({"user": pa.array(ids, pa.string()), **texts})


def _column(header: Header, name: str) -> int:
    column = header.require(name, ())
    if header.is_sequence(column):
        raise UserError(
            f"{header.path}: column {name!r} is of type {header.types[column]}; users are compared by columns with one value "
            "each, of type token or float"
        )
    return column
