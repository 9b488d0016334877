"""Reader of Amazon product metadata: lines of wanted items are parsed, other lines are only searched for the id."""

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import orjson

from cm3.datasets.files.lines import line_blocks
from cm3.datasets.reader import Item, MalformedLines
from cm3.datasets.text import is_unicode

# Unused lists of ids, two thirds of a line of 2014: parsing takes a fifth of the time without them.
_RELATED = re.compile(rb"""'related': \{(?:'[a-z_]+': \[(?:'[0-9A-Z]{10}'(?:, )?)*\](?:, )?)*\}(?:, )?""")
_JSON_ERRORS = (ValueError, RecursionError)
_LITERAL_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


class Metadata:
    """One metadata file.

    Args:
        path: one product per line, JSON or Python literal, plain or gzip.
        key: field with the id, `asin` or `parent_asin`.
        item: function from a parsed line to an Item.
        malformed: largest accepted fraction of malformed lines.
    """

    def __init__(self, path: Path, key: str, item: Callable[[dict[str, Any]], Item], malformed: float) -> None:
        self.path, self.key, self.item, self.malformed = path, key, item, malformed
        # The key as in the published files, by the first quote of a line: quotes inside texts are of the other kind or
        # escaped with a backslash. Lines of any other form are parsed as a whole.
        self.markers = {b"{'": (f"'{key}': '".encode(),), b'{"': (f'"{key}": "'.encode(), f'"{key}":"'.encode())}
        self.notes: dict[str, int] = {}

    def ids(self) -> Iterator[list[str]]:
        """Yield the ids of all lines in batches; a line without id is malformed.

        Raises:
            UserError: too many malformed lines, or a damaged file.
        """
        faults, count = MalformedLines(self.path, self.malformed), 0
        for first, block in line_blocks(self.path):
            found = []
            for number, line in enumerate(block, first):
                item_id = self._id(line)
                if item_id is not None:
                    found.append(item_id)
                elif line.strip():
                    faults.add(number, f"no {self.key}", line)
            count += len(block)
            yield found
        self.notes |= _noted(faults.check(count))

    def read(self, wanted: set[str]) -> dict[str, Item]:
        """Return the wanted items by id. With several lines per id, each field is the first value that is not empty.

        A wanted line that cannot be parsed (code, too deep nesting, a number of a million digits) is counted, and the
        item has neither text nor image.
        """
        encoded = {item_id.encode() for item_id in wanted}
        items: dict[str, Item] = {}
        unreadable = repeated = conflicting = 0
        for _, block in line_blocks(self.path):
            for line in block:
                item_id = self._id(line, encoded)
                if item_id is None or item_id not in wanted:
                    continue
                record = parse(line)
                if record is None:
                    unreadable += 1
                    continue
                item = self.item(record)
                if item_id in items:
                    repeated += 1
                    conflicting += _conflict(items[item_id], item)
                    item = merge(items[item_id], item)
                items[item_id] = item
        self.notes |= {
            "metadata lines unreadable": unreadable,
            "metadata lines repeated": repeated,
            "metadata lines in conflict with an earlier one": conflicting,
        }
        return items

    def _id(self, line: bytes, wanted: set[bytes] | None = None) -> str | None:
        """Return the id of a line or None; with `wanted`, lines of other ids may also give None."""
        for marker in self.markers.get(line[:2], ()):
            start = line.find(marker)
            if start < 0:
                continue
            if line.find(marker, start + 1) >= 0:
                break  # One of the two is inside a text.
            start += len(marker)
            value = line[start : line.find(marker[-1:], start)]
            if b"\\" in value or not value:
                break
            if wanted is not None and value not in wanted:
                return None
            return value.decode(errors="replace")
        record = parse(line)
        item_id = record.get(self.key) if record is not None else None
        return item_id if isinstance(item_id, str) and item_id and is_unicode(item_id) else None


class AmazonReader:
    """Base of the Amazon readers: metadata. Spec: interactions, malformed."""

    def __init__(
        self, spec: dict[str, Any], inputs: dict[str, Path], key: str, item: Callable[[dict[str, Any]], Item]
    ) -> None:
        self.spec, self.inputs = spec, inputs
        self.metadata = Metadata(inputs["meta"], key, item, spec["malformed"])
        self.notes = self.metadata.notes

    def known_items(self) -> Iterable[list[str]]:
        """Return the ids of the metadata."""
        return self.metadata.ids()

    def items(self, wanted: set[str]) -> dict[str, Item]:
        """Parse the metadata of the wanted items."""
        return self.metadata.read(wanted)


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line of JSON or of a Python literal, else None. Nothing is evaluated."""
    try:
        record = orjson.loads(line)
    except ValueError:
        record = _parse_slowly(line)
    return record if isinstance(record, dict) else None


def _parse_slowly(line: bytes) -> Any:
    # Bytes that are not UTF-8 are replaced.
    text = line.strip().decode(errors="replace")
    if text[:2] == '{"':
        try:
            return json.loads(text)
        except _JSON_ERRORS:
            pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # about the data, not about our code
            return ast.literal_eval(_RELATED.sub(b"", line.strip()).decode(errors="replace"))
    except _LITERAL_ERRORS:
        return None


def merge(first: Item, second: Item) -> Item:
    """Return `first` with its empty fields taken from `second`."""
    return replace(first, **{f.name: getattr(second, f.name) for f in fields(Item) if not getattr(first, f.name)})


def _conflict(first: Item, second: Item) -> bool:
    pairs = ((getattr(first, f.name), getattr(second, f.name)) for f in fields(Item))
    return any(one and other and one != other for one, other in pairs)


def _noted(counts: dict[str, int]) -> dict[str, int]:
    return {f"metadata lines {name}": count for name, count in counts.items()}
