"""Reader of RecBole's atomic files: interactions in one file or in three of a published split, and items."""

import io
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from cm3.common.errors import UserError
from cm3.common.ids import MISSING_TEXTS
from cm3.common.tables import SPLITS
from cm3.common.values import shown
from cm3.datasets.files.lines import line_blocks
from cm3.datasets.reader import Item, MalformedLines, interaction_table
from cm3.datasets.recbole.atomic import (
    ITEM,
    ITEM_FIELDS,
    RATING,
    TIME,
    USER,
    Header,
    parse_header,
    read_header,
    rows,
    unquoted,
    wrong_width,
)
from cm3.datasets.text import is_unicode, plain_text
from cm3.datasets.times import Times, as_numbers

_BATCH = 10_000
_NO_ID = pa.array(["", *MISSING_TEXTS])


class Reader:
    """Reads `recbole` datasets. Inputs: interactions, or train, valid and test; optionally items.

    Spec: field_separator, seq_separator, columns, items, malformed.
    """

    def __init__(self, spec: dict[str, Any], inputs: dict[str, Path]) -> None:
        self.spec, self.inputs = spec, inputs
        self.separator = spec["field_separator"]
        self.notes: dict[str, int] = {}

    def interactions(self) -> Iterator[pa.Table]:
        """Yield the interactions in file order; rows without user or item are left out, as RecBole does.

        Raises:
            UserError: with the line: too many malformed lines, a rating that is not a finite number, an invalid time; or a
                (user, item) pair in two parts of a published split.
        """
        pairs = []
        for kind, path in self.inputs.items():
            if kind == "items":
                continue
            label = SPLITS.index(kind) if kind in SPLITS else None
            for table in self._file(path, label):
                if label is not None:
                    pairs.append(table.select(["user", "item", "split"]))
                yield table
        if pairs:
            self._check_one_label_per_pair(pa.concat_tables(pairs))

    def _file(self, path: Path, label: int | None) -> Iterator[pa.Table]:
        header: Header | None = None
        times, count, faults = Times(), 0, MalformedLines(path, self.spec["malformed"])
        for first, block in line_blocks(path):
            lines = [(number, line) for number, line in enumerate(block, first) if line.strip(b" \r")]
            if header is None and lines:
                header = parse_header(path, *lines.pop(0), self.separator)
            if header is None or not lines:
                continue
            count += len(lines)
            if good := _well_formed(lines, header, self.separator, faults):
                yield self._table(_Block(header, self.separator, good), times, label)
        if not count:
            raise UserError(f"{path}: has no interactions; is it complete?")
        self._note(faults.check(count))

    def _table(self, block: "_Block", times: Times, label: int | None) -> pa.Table:
        columns, header = self.spec["columns"], block.header
        user = block.texts(header.require(columns["user"], USER))
        item = block.texts(header.require(columns["item"], ITEM))
        rating, time = header.find(columns["rating"], RATING), header.find(columns["timestamp"], TIME)
        table = interaction_table(
            user,
            item,
            None if rating is None else block.ratings(rating),
            None if time is None else block.seconds(time, times),
            label,
        )
        no_id = pc.or_(*(pc.is_in(ids, value_set=_NO_ID) for ids in (user, item)))
        if found := pc.sum(no_id).as_py():
            self._note({"left out: interaction without user or item": found})
            table = table.filter(pc.invert(no_id))
        return table

    def _check_one_label_per_pair(self, pairs: pa.Table) -> None:
        # A pair with two labels is a leak: a test interaction that is also in training.
        labels = pairs.group_by(["user", "item"]).aggregate([("split", "min"), ("split", "max")])
        several = labels.filter(pc.not_equal(labels["split_min"], labels["split_max"]))
        if len(several):
            first = several.slice(0, 1).to_pylist()[0]
            one, other = SPLITS[first["split_min"]], SPLITS[first["split_max"]]
            raise UserError(
                f"{self.inputs[one].parent}: {len(several)} pairs of user and item are in two parts of the split, such as "
                f"user {first['user']}, item {first['item']} in {one} and {other}; keep each pair in one part, or put all "
                "interactions into one file for a new split"
            )

    def _note(self, counts: dict[str, int]) -> None:
        for reason, count in counts.items():
            self.notes[reason] = self.notes.get(reason, 0) + count

    def known_items(self) -> Iterator[list[str]] | None:
        """Return the ids of the .item file in batches; None without one."""
        if "items" not in self.inputs:
            return None
        ids = list(self._table_of_items)
        return (ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH))

    def items(self, wanted: set[str]) -> dict[str, Item]:
        """Return the wanted rows of the .item file."""
        if "items" not in self.inputs:
            return {}
        return {item_id: item for item_id, item in self._table_of_items.items() if item_id in wanted}

    @cached_property
    def _table_of_items(self) -> dict[str, Item]:
        path = self.inputs["items"]
        header = read_header(path, self.separator)
        key = header.require(self.spec["columns"]["item"], ITEM)
        columns = {name: self._columns(header, name) for name in ITEM_FIELDS}
        table: dict[str, Item] = {}
        faults, count = MalformedLines(path, self.spec["malformed"]), 0
        for number, values in rows(path, self.separator, len(header.names), faults):
            count += 1
            item_id = values[key].strip()
            if item_id in ("", *MISSING_TEXTS) or not is_unicode(item_id):
                self._note({"left out: item without id": 1})
            elif item_id in table:
                raise UserError(f"{path}, line {number}: duplicate item id {item_id!r}; keep one row per item")
            else:
                texts = {name: self._texts(header, name, values, found) for name, found in columns.items()}
                table[item_id] = _item(texts)
        if not count and not faults.reasons:
            raise UserError(f"{path}: has no items, only a header")
        self._note(faults.check(count + faults.reasons.total()))
        return table

    def _columns(self, header: Header, field: str) -> list[int]:
        names = self.spec["items"][field]
        found = [header.find(None, ITEM_FIELDS[field])] if names is None else [header.find(n, ()) for n in names]
        return [column for column in found if column is not None]

    def _texts(self, header: Header, field: str, values: Sequence[str], columns: Sequence[int]) -> list[str]:
        found: list[str] = []
        for column in columns:
            # A title of type token_seq is a sentence; categories are split.
            several = field in ("categories", "features", "image") and header.is_sequence(column)
            found += values[column].split(self.spec["seq_separator"]) if several else [values[column]]
        return found


def _item(texts: dict[str, list[str]]) -> Item:
    plain = {name: [text for text in map(plain_text, found) if text] for name, found in texts.items()}
    return Item(
        title=" ".join(plain["title"]),
        brand=" ".join(plain["brand"]),
        categories=list(dict.fromkeys(text.strip(" ,") for text in plain["categories"] if text.strip(" ,"))),
        description=" ".join(plain["description"]),
        features=list(dict.fromkeys(plain["features"])),
        image_urls=[text.strip() for text in texts["image"] if text.strip() and is_unicode(text)],
    )


class _Block:
    """Some lines of an .inter file as columns of text; every error names the line."""

    def __init__(self, header: Header, separator: str, lines: Sequence[tuple[int, bytes]]) -> None:
        self.header, self.separator, self.lines = header, separator, lines
        names = [str(column) for column in range(len(header.names))]
        try:
            self.table = pa_csv.read_csv(
                io.BytesIO(b"\n".join(line for _, line in lines)),
                read_options=pa_csv.ReadOptions(column_names=names, use_threads=False),
                parse_options=pa_csv.ParseOptions(delimiter=separator, quote_char=False),
                convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
            )
        except pa.ArrowInvalid as error:
            raise self._malformed(error) from None

    def texts(self, column: int) -> pa.Array:
        """Return (N,) values of a column without white space and quotes around them."""
        values = pc.utf8_trim_whitespace(self.table.column(column).combine_chunks())
        if pc.any(pc.starts_with(values, '"')).as_py():
            values = pa.array([unquoted(text) for text in values.to_pylist()], pa.string())
        return values

    def ratings(self, column: int) -> pa.Array:
        """Return (N,) float32 ratings, null for an empty cell."""
        values, empty = self._filled(column)
        with np.errstate(over="ignore"):
            numbers = as_numbers(pa.chunked_array([values])).astype(np.float32)
        self._check(~np.isfinite(numbers), column, "is not a finite number; fix the line or remove it")
        return pa.array(numbers, mask=empty)

    def seconds(self, column: int, times: Times) -> pa.Array:
        """Return (N,) Unix seconds, null for an empty cell; `times` has parsed the blocks before."""
        values, empty = self._filled(column)
        seconds = times.parse(pa.chunked_array([values]), lambda bad, reason: self._check(bad, column, reason))
        return pa.array(seconds, mask=empty)

    def _filled(self, column: int) -> tuple[pa.Array, np.ndarray]:
        """Return the values of a column with 0 in empty cells, and which cells are empty."""
        values = self.texts(column)
        empty = pc.equal(values, "")
        return pc.if_else(empty, "0", values), empty.to_numpy(zero_copy_only=False)

    def _check(self, bad: np.ndarray, column: int, complaint: str) -> None:
        found = np.flatnonzero(bad)
        if len(found):
            place = f"{self.header.path}, line {self.lines[int(found[0])][0]}"
            value = self.table.column(column)[int(found[0])].as_py()
            raise UserError(f"{place}: {self.header.names[column]} = {shown(value)} {complaint}")

    def _malformed(self, error: Exception) -> UserError:
        for number, line in self.lines:
            try:
                line.decode()
            except UnicodeDecodeError:
                return UserError(f"{self.header.path}, line {number}: not UTF-8 text; convert the file to UTF-8")
        return UserError(f"{self.header.path}, lines {self.lines[0][0]} to {self.lines[-1][0]}: {error}")


def _well_formed(
    lines: Sequence[tuple[int, bytes]], header: Header, separator: str, faults: MalformedLines
) -> list[tuple[int, bytes]]:
    """Return the lines with as many values as the header has."""
    width, mark = len(header.names), separator.encode()
    good = []
    for number, line in lines:
        if line.count(mark) == width - 1:
            good.append((number, line))
        else:
            faults.add(number, wrong_width(line.count(mark) + 1, width, separator), line)
    return good
