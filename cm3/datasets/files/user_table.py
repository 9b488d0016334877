"""The user's own users' table: ids, and the columns that users are compared by."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from cm3.common.input_files import parts_in
from cm3.datasets.files.columns import parse_ids, parse_labels
from cm3.datasets.files.reader import dialect_of
from cm3.datasets.files.tabular import read_columns


def read_users(spec: dict[str, Any], inputs: dict[str, Path]) -> Iterator[tuple[Callable[[int], str], pa.Table]]:
    """Yield parts of the table: "path, line N" by row, and a table of `user` and the groups, all text; null is unknown.

    Args:
        spec: format, columns (user_id and groups), and how the table is written.
        inputs: user_table; other columns of it are not read.

    Raises:
        UserError: with the line: a malformed file, a missing column or id, a value that is neither text nor a number.
    """
    key, groups = spec["columns"]["user_id"], spec["columns"]["groups"]
    paths = parts_in(inputs, "user_table")
    for part in read_columns(paths, spec["format"], [key, *groups], ids=(key,), dialect=dialect_of(spec)):
        ids = parse_ids(part, key, "row", needs="a user id")
        yield part.place, pa.table({"user": ids, **{name: parse_labels(part, name) for name in groups}})
