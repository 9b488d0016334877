"""Texts of reviews in the user's own table of interactions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from cm3.common.errors import UserError
from cm3.common.input_files import parts_in
from cm3.common.values import is_text, plain_column
from cm3.datasets.files.reader import interactions_of
from cm3.datasets.files.tabular import Columns
from cm3.datasets.text import plain_text


def read_texts(spec: dict[str, Any], inputs: dict[str, Path]) -> Iterator[pa.Table]:
    """Yield tables of user, item, rating, timestamp and text.

    Args:
        spec: format, columns (with review), and how the table is written and which rows count, as in `interactions_of`.
        inputs: interactions.

    Raises:
        UserError: with the line: as the reader of interactions, or the column of reviews holds no text.
    """
    column = spec["columns"]["review"]
    for part, table, kept in interactions_of(parts_in(inputs, "interactions"), spec, {}):
        texts = pa.array([plain_text(text or "") for text in _texts(part, column)], pa.string())
        yield table.drop_columns(["split"]).append_column("text", texts.filter(pa.array(kept)))


def _texts(part: Columns, column: str) -> list[str | None]:
    values = plain_column(part.values[column])
    if not is_text(values.type) and not pa.types.is_null(values.type):
        raise UserError(
            f"{part.path}: column {column!r} is of type {values.type}, where the text of reviews is expected"
        )
    texts: list[str | None] = values.to_pylist()
    return texts
