"""Reader of MMRec folders: {name}.inter with numbers and split labels, and mappings of numbers to original ids."""

import io
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from cm3.common.errors import UserError
from cm3.common.strict import nearest
from cm3.common.tables import SPLITS
from cm3.datasets.files.kinds import check_header
from cm3.datasets.files.lines import line_blocks
from cm3.datasets.mmrec.format import ITEM, LABEL, RATING, TIME, USER
from cm3.datasets.mmrec.tables import item_of, number_in, read_mapping, read_table
from cm3.datasets.reader import Item, interaction_table
from cm3.datasets.times import Times, as_number

log = logging.getLogger("cm3.datasets.mmrec")

_REQUIRED = (USER, ITEM)
_KNOWN = {USER: pa.int64(), ITEM: pa.int64(), RATING: pa.float64(), TIME: pa.float64(), LABEL: pa.float64()}
_LABELS = (0.0, 1.0, 2.0)
_BATCH = 10_000
_ITEM_BITS = 31
_LARGEST_RATING = float(np.finfo(np.float32).max)


class Reader:
    """Reads `mmrec` datasets. Inputs: interactions; optionally item_ids, user_ids and meta."""

    def __init__(self, spec: dict[str, Any], inputs: dict[str, Path]) -> None:
        self.spec, self.inputs = spec, inputs
        self.notes: dict[str, int] = {}

    def interactions(self) -> Iterator[pa.Table]:
        """Yield the interactions in file order, with original ids and, if present, labels.

        Raises:
            UserError: with the line: a malformed line, a label other than 0, 1 and 2, a rating that is not a finite
                number, an invalid time, a number without id in the mapping; or a (user, item) pair with two labels.
        """
        path = self.inputs["interactions"]
        users, items = self._names("user_ids", USER), self._names("item_ids", ITEM)
        header: list[str] = []
        pairs: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        count, times = 0, Times(mixed_units=True)
        for first, block in line_blocks(path):
            lines = [(number, line) for number, line in enumerate(block, first) if line.strip(b" \r")]
            if not header and lines:
                header = _header(path, *lines.pop(0))
            if not lines:
                continue
            found = _Block(path, header, lines)
            user, item, label = found.numbers(USER), found.numbers(ITEM), found.labels()
            if label is not None:
                pairs.append(user << _ITEM_BITS | item)
                labels.append(label)
            count += len(lines)
            yield interaction_table(
                users.of(user, found),
                items.of(item, found),
                found.ratings(),
                found.seconds(times),
                None if label is None else pa.array(label, pa.int8()),
            )
        if not count:
            raise UserError(f"{path}: has no interactions; is it complete?")
        if labels:
            _check_one_label_per_pair(path, np.concatenate(pairs), np.concatenate(labels))

    def known_items(self) -> Iterable[list[str]] | None:
        """Return the ids of the mapping or else of meta-{name}.csv; None if neither exists."""
        if "item_ids" in self.inputs:
            ids = list(self._names("item_ids", ITEM).names.values())
        elif "meta" in self.inputs:
            ids = [
                str(number_in(place, ITEM, row[ITEM])) for place, row in read_table(self.inputs["meta"], ",", [ITEM])
            ]
        else:
            return None
        return (ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH))

    def items(self, wanted: set[str]) -> dict[str, Item]:
        """Return the wanted items, from meta-{name}.csv and from further columns of the mapping.

        Columns as in MMRec's preprocessing: title, brand, categories (a Python list), description and imUrl.
        """
        names = self._names("item_ids", ITEM)
        table: dict[str, dict[str, str]] = {}
        for kind, delimiter in (("item_ids", "\t"), ("meta", ",")):
            if kind in self.inputs:
                seen: set[int] = set()
                again: list[str] = []
                for place, row in read_table(self.inputs[kind], delimiter, [ITEM]):
                    number = number_in(place, ITEM, row[ITEM])
                    if number in seen:
                        again.append(f"{place}: duplicate {ITEM} {number}")
                    seen.add(number)
                    item_id = names.names.get(number, str(number)) if names.names else str(number)
                    if item_id in wanted:
                        table.setdefault(item_id, {}).update(row)
                if again:
                    log.warning("%s; the last row is used (%d such rows)", again[0], len(again))
        return {item_id: item_of(row) for item_id, row in table.items()}

    def _names(self, kind: str, column: str) -> "_Names":
        if column not in self._read:
            path = self.inputs.get(kind)
            self._read[column] = _Names(column, path, read_mapping(path, column) if path else {})
        return self._read[column]

    @cached_property
    def _read(self) -> dict[str, "_Names"]:
        return {}


class _Names:
    """Original ids by number; without a mapping, the number is the id."""

    def __init__(self, column: str, path: Path | None, names: Mapping[int, str]) -> None:
        self.column, self.path, self.names = column, path, names
        self._numbers = np.sort(np.fromiter(names, np.int64, len(names)))
        self._ids = pa.array([names[number] for number in self._numbers.tolist()], pa.string())

    def of(self, numbers: np.ndarray, block: "_Block") -> pa.Array:
        """Return the ids of (N,) numbers. Raises UserError with the line of a number without id."""
        if self.path is None:
            return pa.array(numbers).cast(pa.string())
        place = np.minimum(np.searchsorted(self._numbers, numbers), len(self._numbers) - 1)
        block.check(
            self._numbers[place] != numbers,
            self.column,
            f"is not in {self.path}; use the mapping that belongs to the file",
        )
        return self._ids.take(pa.array(place))


class _Block:
    """Some lines of {name}.inter as numbers; every error names the line."""

    def __init__(self, path: Path, header: Sequence[str], lines: Sequence[tuple[int, bytes]]) -> None:
        self.path, self.header, self.lines = path, header, lines
        try:
            self.table = self._read(_KNOWN)
        except pa.ArrowInvalid:
            # pandas writes integers as floats, such as 7.0, once a column had an empty cell.
            try:
                self.table = self._read({name: pa.float64() for name in _KNOWN})
            except pa.ArrowInvalid as error:
                raise self._malformed(error) from None

    def _read(self, types: Mapping[str, pa.DataType]) -> pa.Table:
        known = [name for name in self.header if name in types]
        return pa_csv.read_csv(
            io.BytesIO(b"\n".join(line for _, line in self.lines)),
            read_options=pa_csv.ReadOptions(column_names=self.header, use_threads=False),
            parse_options=pa_csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=pa_csv.ConvertOptions(include_columns=known, column_types=types, null_values=[""]),
        )

    def check(self, bad: np.ndarray, column: str, complaint: str) -> None:
        """Raise a UserError with the first of the `bad` rows."""
        found = np.flatnonzero(bad)
        if len(found):
            number, line = self.lines[int(found[0])]
            value = _decode(line).rstrip("\r").split("\t")[self.header.index(column)]
            raise UserError(f"{self.path}, line {number}: {column} = {value!r} {complaint}")

    def numbers(self, column: str) -> np.ndarray:
        """Return (N,) int64 numbers of users or items."""
        values = self.table.column(column)
        self.check(values.is_null().to_numpy(), column, "is empty; every interaction needs a user and an item")
        numbers = values.to_numpy()
        if numbers.dtype.kind == "f":
            whole = (np.abs(numbers) < 2.0**63) & (numbers % 1 == 0)
            self.check(~whole, column, "is not a number; users and items are numbered from 0")
        self.check(numbers < 0, column, "is negative; users and items are numbered from 0")
        self.check(numbers >= 1 << _ITEM_BITS, column, "is too large; users and items are numbered from 0 without gaps")
        found: np.ndarray = numbers.astype(np.int64)
        return found

    def floats(self, column: str) -> pa.ChunkedArray | None:
        """Return finite float64 numbers, null for an empty cell; None without the column."""
        if column not in self.header:
            return None
        values = self.table.column(column)
        bad = ~np.isfinite(values.to_numpy()) & values.is_valid().to_numpy()
        self.check(bad, column, "is not a finite number; fix the line or remove it")
        return values

    def ratings(self) -> pa.ChunkedArray | None:
        """Return ratings that are finite as float32, null for an empty cell; None without the column."""
        values = self.floats(RATING)
        if values is not None:
            self.check(np.abs(values.to_numpy()) > _LARGEST_RATING, RATING, "is not a finite number as float32")
        return values

    def seconds(self, times: Times) -> pa.Array | None:
        """Return Unix seconds, null for an empty cell; None without the column. `times` has parsed the blocks before."""
        values = self.floats(TIME)
        if values is None:
            return None
        unknown = values.is_null().to_numpy()
        numbers = np.where(unknown, 0, values.to_numpy())
        seconds = times.parse_numbers(numbers, lambda bad, complaint: self.check(bad, TIME, complaint))
        return pa.array(seconds, mask=unknown)

    def labels(self) -> np.ndarray | None:
        """Return (N,) int8 of 0 train, 1 valid, 2 test; None without the column."""
        if LABEL not in self.header:
            return None
        values = self.table.column(LABEL).to_numpy()
        self.check(~np.isin(values, _LABELS), LABEL, "is not 0 (train), 1 (valid) or 2 (test)")
        found: np.ndarray | None = values.astype(np.int8)
        return found

    def _malformed(self, error: Exception) -> UserError:
        for number, line in self.lines:
            values = _decode(line).rstrip("\r").split("\t")
            if len(values) != len(self.header):
                return UserError(
                    f"{self.path}, line {number}: has {len(values)} values, the header has {len(self.header)}: "
                    f"{_decode(line)[:80]!r}"
                )
            for name, value in zip(self.header, values, strict=True):
                if name in _KNOWN and not _is_number(value):
                    return UserError(f"{self.path}, line {number}: {name} = {value[:80]!r} is not a number")
        return UserError(f"{self.path}, lines {self.lines[0][0]} to {self.lines[-1][0]}: {error}")


def _header(path: Path, number: int, line: bytes) -> list[str]:
    check_header(path, line)
    names = _decode(line).removeprefix("\ufeff").rstrip("\r").split("\t")
    if any(name.endswith((":token", ":float")) for name in names):
        raise UserError(f"{path}, line {number}: has the header of a RecBole file, {names[0]!r}; set source: recbole")
    for name in _REQUIRED:
        if name not in names:
            raise UserError(
                f"{path}, line {number}: has no column {name!r}{nearest(name, names)}; the first line must have "
                f"{USER} and {ITEM}, separated by tabs"
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}, line {number}: duplicate column {twice[0]!r} in the header")
    return names


def _is_number(value: str) -> bool:
    return not value or not math.isnan(as_number(value)) or value.strip("+-").lower() == "nan"


def _check_one_label_per_pair(path: Path, pair: np.ndarray, label: np.ndarray) -> None:
    # A pair with two labels is a leak: a test interaction that is also in training.
    order = np.argsort(pair, kind="stable")
    pair, label = pair[order], label[order]
    same = (pair[1:] == pair[:-1]) & (label[1:] != label[:-1])
    if same.any():
        first = int(np.flatnonzero(same)[0])
        user, item = divmod(int(pair[first]), 1 << _ITEM_BITS)
        one, other = sorted((label[first], label[first + 1]))
        raise UserError(
            f"{path}: {len(np.unique(pair[1:][same]))} pairs of user and item are in two parts of the split, the first is "
            f"{USER} {user}, {ITEM} {item} in {SPLITS[one]} and {SPLITS[other]}; keep each pair in one part, or "
            f"remove the column {LABEL} for a new split"
        )


def _decode(line: bytes) -> str:
    return line.decode(errors="replace")
