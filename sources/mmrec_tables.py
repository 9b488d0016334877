"""Tables of MMRec folders beside the interactions: mappings of numbers to original ids, and meta-{name}.csv."""

import ast
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sources.lines import GZIP_ERRORS, open_bytes
from sources.reading import Item
from sources.text import clean
from stages.errors import UserError
from stages.strict import nearest

_TEXT_BYTES = 1 << 24


def read_mapping(path: Path, column: str) -> dict[int, str]:
    """Return the original id of each number; the id is the first column beside `column`."""
    names: dict[int, str] = {}
    ids: set[str] = set()
    for place, row in read_table(path, "\t", [column]):
        number = number_in(place, column, row[column])
        item_id = next((value for name, value in row.items() if name != column), "")
        if not item_id:
            raise UserError(
                f"{place}: has no id beside {column}; the columns are an id and {column}, with a tab between"
            )
        if number in names or item_id in ids:
            again = f"{column} {number}" if number in names else f"id {item_id[:80]!r}"
            raise UserError(f"{place}: {again} stands there again; every id has one number")
        names[number] = item_id
        ids.add(item_id)
    if not names:
        raise UserError(f"{path}: holds no ids, only a header")
    return names


def read_table(path: Path, delimiter: str, required: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("path, line N", row) of a table with a header, quoted as pandas does."""
    csv.field_size_limit(_TEXT_BYTES)
    with open_bytes(path) as file:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter)
        try:
            header = next(reader, [])
            for name in required:
                if name not in header:
                    raise UserError(f"{path}: has no column {name!r}{nearest(name, header)}")
            for values in reader:
                if not values:
                    continue
                place = f"{path}, line {reader.line_num}"
                if len(values) != len(header):
                    raise UserError(f"{place}: has {len(values)} values where the header names {len(header)}")
                yield place, dict(zip(header, values, strict=True))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, after line {reader.line_num}: not UTF-8 text ({error.reason})") from None
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from None
        except GZIP_ERRORS as error:
            raise UserError(f"{path}: damaged gzip after line {reader.line_num} ({error})") from None


def number_in(place: str, column: str, value: str) -> int:
    """Return a number of a user or item. Raises UserError with its place."""
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise UserError(f"{place}: {column} = {value[:80]!r} is not a number; users and items are numbered from 0")
    return int(value)


def item_of(row: Mapping[str, str]) -> Item:
    """Return the item that a row of strings describes; texts are cleaned, absent ones empty."""
    return Item(
        title=clean(row.get("title", "")),
        brand=clean(row.get("brand", "")),
        categories=list(dict.fromkeys(filter(None, map(clean, _flat(row.get("categories", "")))))),
        description=clean(row.get("description", "")),
        image_urls=[url for url in [row.get("imUrl", "").strip()] if url],
    )


def _flat(text: str) -> list[str]:
    """Return the strings of nested lists written in Python, as pandas writes them to a csv; other text as it is."""
    if not text.startswith("["):
        return [text]
    try:
        # literal_eval and not eval: the text is a stranger's.
        waiting: list[Any] = [ast.literal_eval(text)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return [text]
    found: list[str] = []
    while waiting:
        value = waiting.pop()
        if isinstance(value, list | tuple):
            waiting += reversed(value)
        elif isinstance(value, str):
            found.append(value)
    return found
