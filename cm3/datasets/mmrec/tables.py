"""Readers of MMRec's tables: mappings of numbers to original ids, and item metadata."""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cm3.common.errors import UserError
from cm3.common.ids import id_text, is_index
from cm3.common.strict import nearest
from cm3.datasets.files.delimited import delimited_lines
from cm3.datasets.reader import Item
from cm3.datasets.text import leaves, plain_text

# Programs such as pandas write 7 as 7.0 once a column had an empty cell.
_WHOLE = re.compile(r"([0-9]{1,18})(?:\.0+)?")


def read_mapping(path: Path, column: str) -> dict[int, str]:
    """Return the original id of each number in `column`; the id is the first other column that is not pandas' index.

    Raises:
        UserError: with the line: malformed, a number or id is missing, invalid or duplicated.
    """
    names: dict[int, str] = {}
    ids: set[str] = set()
    for place, row in read_table(path, "\t", [column]):
        number = number_in(place, column, row[column])
        item_id = next((value for name, value in row.items() if name != column and not is_index(name)), "")
        if id_text(item_id) is None:
            raise UserError(
                f"{place}: has no id next to {column}; the columns must be an id and {column}, separated by a tab"
            )
        if number in names or item_id in ids:
            again = f"{column} {number}" if number in names else f"id {item_id[:80]!r}"
            raise UserError(f"{place}: duplicate {again}; every id must have one number")
        names[number] = item_id
        ids.add(item_id)
    if not names:
        raise UserError(f"{path}: has no ids, only a header")
    return names


def read_table(path: Path, delimiter: str, required: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("path, line N", row) of a table with a header, quoted as pandas does."""
    rows = delimited_lines(path, delimiter)
    _, header = next(rows, (0, []))
    for name in required:
        if name not in header:
            separator = {"\t": "a tab", ",": "a comma"}[delimiter]
            raise UserError(
                f"{path}: has no column {name!r}{nearest(name, header)}; the first line must name the columns, separated by "
                f"{separator}"
            )
    for number, values in rows:
        place = f"{path}, line {number}"
        if len(header) > 1 and len(values) == 1 and not values[0].strip():
            continue
        if len(values) != len(header):
            raise UserError(f"{place}: has {len(values)} values, the header has {len(header)}")
        yield place, dict(zip(header, values, strict=True))


def number_in(place: str, column: str, value: str) -> int:
    """Return the number of a user or item. Raises UserError with `place`."""
    digits = _WHOLE.fullmatch(value)
    if not digits:
        raise UserError(f"{place}: {column} = {value[:80]!r} is not a number; users and items are numbered from 0")
    return int(digits[1])


def item_of(row: Mapping[str, str]) -> Item:
    """Return the item of a row of strings; texts are plain text, empty where absent."""
    return Item(
        title=plain_text(row.get("title", "")),
        brand=plain_text(row.get("brand", "")),
        categories=list(dict.fromkeys(filter(None, map(plain_text, _flat(row.get("categories", "")))))),
        description=plain_text(row.get("description", "")),
        image_urls=[url for url in [row.get("imUrl", "").strip()] if url],
    )


def _flat(text: str) -> list[str]:
    """Return the strings of nested Python lists, as pandas writes them to a csv; other text unchanged."""
    if not text.startswith("["):
        return [text]
    try:
        # literal_eval and not eval: the text is untrusted.
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return [text]
    return [value for value in leaves(found) if isinstance(value, str)]
