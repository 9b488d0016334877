"""Reader of the user's own tables of interactions and items, with configured column names."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cm3.common.errors import UserError
from cm3.common.strict import nearest
from cm3.datasets.files.columns import Times, parse_ids, parse_ratings
from cm3.datasets.files.tabular import LONE_SURROGATE, read_columns, read_rows
from cm3.datasets.reader import Item, interaction_table
from cm3.datasets.text import image_urls, is_unicode, leaves, plain_text


class Reader:
    """Reads `files` datasets. Spec: interactions {format, columns}, items {format, columns} or None."""

    def __init__(self, spec: dict[str, Any], inputs: dict[str, Path]) -> None:
        self.spec, self.inputs = spec, inputs
        self.notes: dict[str, int] = {}
        self._table: dict[str, Item] | None = None

    def interactions(self) -> Iterator[pa.Table]:
        """Read the interactions table.

        Raises:
            UserError: with the line: malformed file, empty id, a rating that is not a finite number, an invalid time.
        """
        columns: dict[str, str | None] = self.spec["interactions"]["columns"]
        names = list(dict.fromkeys(name for name in columns.values() if name is not None))
        rating, timestamp, times = columns.get("rating"), columns.get("timestamp"), Times()
        for part in read_columns(self.inputs["interactions"], self.spec["interactions"]["format"], names):
            yield interaction_table(
                parse_ids(part, columns["user"] or ""),
                parse_ids(part, columns["item"] or ""),
                pa.array(parse_ratings(part, rating)) if rating else None,
                pa.array(times.parse(part, timestamp)) if timestamp else None,
            )

    def known_items(self) -> Iterable[list[str]] | None:
        """Return the ids of the item table, None without one."""
        return [list(self._read_items())] if "items" in self.inputs else None

    def items(self, wanted: set[str]) -> dict[str, Item]:
        """Return the wanted rows of the item table."""
        return {item_id: item for item_id, item in self._read_items().items() if item_id in wanted}

    def _read_items(self) -> dict[str, Item]:
        if self._table is None:
            self._table = self._parse_items() if "items" in self.inputs else {}
        return self._table

    def _parse_items(self) -> dict[str, Item]:
        columns: dict[str, Any] = self.spec["items"]["columns"]
        key = columns["item_id"]
        fields = {
            name: columns.get(name) or []
            for name in ("title", "brand", "categories", "description", "features", "image")
        }
        names = list(dict.fromkeys([key, *(name for several in fields.values() for name in several)]))
        table: dict[str, Item] = {}
        places: dict[str, str] = {}
        for place, row in read_rows(self.inputs["items"], self.spec["items"]["format"], names):
            if key not in row:
                raise UserError(f"{place}: has no {key!r}{nearest(key, row)}; every item needs an id")
            item_id = _scalar(row[key])
            if not item_id:
                raise UserError(f"{place}: {key} is empty; every item needs an id")
            if not is_unicode(item_id):
                raise UserError(f"{place}: {key} = {item_id!r} {LONE_SURROGATE}")
            if item_id in table:
                raise UserError(
                    f"{place}: duplicate item id {item_id!r}, first at {places[item_id]}; keep one row per item"
                )
            places[item_id] = place
            table[item_id] = Item(
                title=" ".join(_texts(row, fields["title"])),
                brand=" ".join(_texts(row, fields["brand"])),
                categories=list(dict.fromkeys(_texts(row, fields["categories"]))),
                description=" ".join(_texts(row, fields["description"])),
                features=list(dict.fromkeys(_texts(row, fields["features"]))),
                image_urls=image_urls(text for name in fields["image"] for text in _flat(row.get(name))),
            )
        return table


def _texts(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    found = (plain_text(text) for name in names for text in _flat(row.get(name)))
    return [text for text in found if text]


def _flat(value: Any) -> list[str]:
    return [text for text in map(_scalar, leaves(value)) if text]


def _scalar(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return str(value)
