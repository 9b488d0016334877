"""Reader of the user's own tables of interactions and items, with configured column names."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cm3.common.errors import UserError
from cm3.common.ids import id_text, missing_id
from cm3.common.input_files import parts_in
from cm3.common.strict import nearest
from cm3.common.values import shown
from cm3.datasets.files.columns import has_event, parse_ids, parse_ratings, parse_splits, parse_times
from cm3.datasets.files.delimited import Dialect
from cm3.datasets.files.tabular import DELIMITER, Columns, read_columns, read_rows
from cm3.datasets.reader import Item, interaction_table
from cm3.datasets.text import image_urls, leaves, plain_text
from cm3.datasets.times import Times

log = logging.getLogger("cm3.datasets.files")

_SHORTENED = r"^[0-9][.,][0-9]+[eE]\+[0-9]{1,2}$"


class Reader:
    """Reads `files` datasets. Spec: interactions {format, columns}, items {format, columns} or None."""

    def __init__(self, spec: dict[str, Any], inputs: dict[str, Path]) -> None:
        self.spec, self.inputs = spec, inputs
        self.notes: dict[str, int] = {}
        self._table: dict[str, Item] | None = None

    def interactions(self) -> Iterator[pa.Table]:
        """Read the interactions table.

        Raises:
            UserError: with the line: malformed file, missing or invalid id, a rating that is not a finite number, an
                invalid time.
        """
        parts = parts_in(self.inputs, "interactions")
        for _, table, _ in interactions_of(parts, self.spec["interactions"], self.notes):
            yield table

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
        entry = self.spec["items"]
        for place, row in read_rows(parts_in(self.inputs, "items"), entry["format"], names, dialect_of(entry)):
            if key not in row:
                raise UserError(f"{place}: has no {key!r}{nearest(key, row)}; every item needs an id")
            item_id = _id(place, key, row[key])
            if item_id in table:
                raise UserError(
                    f"{place}: duplicate item id {item_id!r}, first at {places[item_id]}; keep one row per item"
                )
            places[item_id] = place
            table[item_id] = Item(
                title=" ".join(_texts(place, row, fields["title"])),
                brand=" ".join(_texts(place, row, fields["brand"])),
                categories=list(dict.fromkeys(_texts(place, row, fields["categories"]))),
                description=" ".join(_texts(place, row, fields["description"])),
                features=list(dict.fromkeys(_texts(place, row, fields["features"]))),
                image_urls=image_urls(_flat(place, row, fields["image"])),
            )
        return table


def interactions_of(
    paths: Sequence[Path], entry: dict[str, Any], notes: dict[str, int]
) -> Iterator[tuple[Columns, pa.Table, np.ndarray]]:
    """Yield the columns of parts of a table of interactions, the interactions in them that count, and their rows.

    Args:
        paths: its files.
        entry: how it is written: format (csv, tsv, jsonl or parquet), columns (user and item, and optionally others),
            and optionally delimiter, encoding, header, decimal, min_rating and events.
        notes: counts of the rows that `min_rating` and `events` leave out, which are added here.

    Yields:
        the columns of (N) rows, a table of those that are kept, and (N,) bool: which they are.

    Raises:
        UserError: as `Reader.interactions`.
    """
    columns: dict[str, str | None] = entry["columns"]
    names = list(dict.fromkeys(name for name in columns.values() if name is not None))
    rating, timestamp, label, times = columns.get("rating"), columns.get("timestamp"), columns.get("split"), Times()
    user, item = columns["user"] or "", columns["item"] or ""
    rows = left = 0
    for part in read_columns(paths, entry["format"], names, ids=(user, item), dialect=dialect_of(entry)):
        ratings = parse_ratings(part, rating, entry.get("decimal", ".")) if rating else None
        table = interaction_table(
            parse_ids(part, user),
            parse_ids(part, item),
            pa.array(ratings) if ratings is not None else None,
            pa.array(parse_times(part, timestamp, times)) if timestamp else None,
            parse_splits(part, label) if label else None,
        )
        if not rows:
            _warn_of_shortened(part, (user, item), table)
        kept = _kept(part, entry, ratings, notes)
        rows, left = rows + len(kept), left + int(kept.sum())
        yield part, table if kept.all() else table.filter(pa.array(kept)), kept

    if rows and not left:
        raise UserError(f"{paths[0]}: no row of {rows} is left; {_left_out(entry, part)}")


def _left_out(entry: dict[str, Any], part: Columns) -> str:
    """Return the filters of a table of interactions, with the kinds of events in a part of it."""
    filters = [f"min_rating = {entry['min_rating']}"] if "min_rating" in entry else []
    if "events" in entry:
        names = {str(value) for value in part.values[entry["columns"]["event"]].slice(0, 1000).to_pylist()}
        filters.append(f"events = {entry['events']} (the file has {', '.join(map(repr, sorted(names)[:5]))})")
    return f"correct {' and '.join(filters)}"


def _warn_of_shortened(part: Columns, names: Sequence[str], table: pa.Table) -> None:
    """Warn of ids that look like long numbers that a spreadsheet has shortened, because different ones become equal."""
    for name, ids in zip(names, (table.column("user"), table.column("item")), strict=True):
        found = pc.filter(ids, pc.match_substring_regex(ids, _SHORTENED))
        if len(found):
            log.warning(
                "%s: %d of the first %d values of %s, such as %r, look like long numbers that a spreadsheet has shortened; "
                "different ids may have become one: export the column as text",
                part.path,
                len(found),
                len(ids),
                name,
                found[0].as_py(),
            )


def _kept(part: Columns, entry: dict[str, Any], ratings: np.ndarray | None, notes: dict[str, int]) -> np.ndarray:
    """Return which rows `min_rating` and `events` keep, (N,) bool, and count the others in the notes."""
    filters = {}
    if ratings is not None and "min_rating" in entry:
        filters["rating below min_rating"] = ratings >= entry["min_rating"]
    if "events" in entry:
        filters["event not in events"] = has_event(part, entry["columns"]["event"], entry["events"])
    kept = np.ones(len(next(iter(part.values.values()))), bool)
    for reason, passed in filters.items():
        name = f"left out: {reason}"
        notes[name] = notes.get(name, 0) + int((kept & ~passed).sum())
        kept &= passed
    return kept


def dialect_of(entry: dict[str, Any]) -> Dialect | None:
    """Return how a csv or tsv table is written, from its entry in the spec."""
    if entry["format"] not in DELIMITER:
        return None
    mark = entry.get("delimiter", DELIMITER[entry["format"]])
    return Dialect(mark, entry.get("encoding", "utf-8"), tuple(entry.get("header", ())))


def _id(place: str, key: str, value: Any) -> str:
    try:
        item_id = id_text(value)
    except ValueError as error:
        raise UserError(f"{place}: {key} = {shown(value)} {error}") from None
    if item_id is None:
        raise UserError(f"{place}: {key} {missing_id(value)}; every item needs an id")
    return item_id


def _texts(place: str, row: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [text for text in map(plain_text, _flat(place, row, names)) if text]


def _flat(place: str, row: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Return the texts of columns, which hold texts or nested lists of them, in order and without empty ones."""
    texts = []
    for name in names:
        for value in leaves(row.get(name)):
            try:
                texts.append(_text(value))
            except ValueError as error:
                raise UserError(f"{place}: {name} = {shown(value)} {error}") from None
    return [text for text in texts if text]


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError(
                "is binary data, not UTF-8 text; name a column of texts, and of images the paths or URLs"
            ) from None
    if isinstance(value, dict):
        raise ValueError("is an object, not a text; store the text in a column of its own and name that")
    return str(value)
