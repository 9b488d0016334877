"""Item ids of the rows of an .npy array, read from a separate file; never assumed from the order of the items."""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from cm3.common.errors import UserError
from cm3.common.gzip import is_gzip
from cm3.common.ids import id_text, is_index, missing_id
from cm3.common.input_files import check_readable

ROW, USER = "itemID", "userID"
"""Columns of MMRec's tables: an item's number is the row of its vector."""

_WHOLE = re.compile(r"([0-9]{1,18})(?:\.0+)?")
_ITEMS = 2**31
_DAMAGED = (OSError, EOFError, UnicodeDecodeError, zlib.error)


@dataclass(frozen=True)
class RowIds:
    """The ids of an array's rows, as UTF-8 bytes.

    Attributes:
        path: the file of ids.
    """

    path: Path
    names: Sequence[bytes]

    def check(self, vectors: Path, rows: int) -> None:
        """Raise a UserError unless the array has exactly one row for each id."""
        if len(self.names) != rows:
            first = self.names[0].decode() if len(self.names) == rows + 1 else None
            header = f"; if the first line, {first!r}, is a header, remove it" if first is not None else ""
            raise UserError(
                f"{self.path}: {len(self.names)} ids, but {vectors} has {rows} rows; they must be of the same items{header}"
            )


def read_row_ids(path: Path) -> RowIds:
    """Return the ids of rows 0, 1, 2, ... of the .npy file that belongs to `path`.

    `path` is one of: a text file with one id a line, in the order of rows; MMRec's i_id_mapping.csv (a column of ids and
    itemID, the row, in any order); or MMRec's {name}.inter, where an itemID is its own id. Plain or gzip.

    Raises:
        UserError: unreadable, or the numbers of a mapping are not 0 to n - 1, each once.
    """
    check_readable(path, "ids")
    try:
        with _opened(path) as file:
            header = file.readline().decode("utf-8-sig").rstrip("\r\n").split("\t")
            file.seek(0)
            if len(header) > 1 and ROW in header:
                return RowIds(path, _of_interactions(path, file) if USER in header else _of_mapping(path, file))
            return RowIds(path, _of_lines(path, file.read().decode("utf-8-sig")))
    except _DAMAGED as error:
        raise UserError(f"ids = {str(path)!r}: not a readable text file ({error})") from error


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if is_gzip(path) else path.open("rb"))


def _of_lines(path: Path, text: str) -> list[bytes]:
    # Not splitlines, which also splits at characters that ids may hold, such as U+2028.
    lines = [line.rstrip("\n") for line in io.StringIO(text, newline=None)]
    while lines and not lines[-1].strip():
        lines.pop()
    return [_id(f"{path}, line {number}", line) for number, line in enumerate(lines, 1)]


def _id(place: str, text: str) -> bytes:
    item_id = id_text(text)
    if item_id is None:
        raise UserError(f"{place}: {text!r} {missing_id(text)}; every row of the vectors needs an item id")
    return item_id.encode()


def _of_mapping(path: Path, file: BinaryIO) -> list[bytes]:
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter="\t")
    header = next(reader)
    number = header.index(ROW)
    name = next((place for place, column in enumerate(header) if column != ROW and not is_index(column)), None)
    if name is None:
        raise UserError(f"{path}: has no column of ids next to {ROW}")
    names: dict[int, bytes] = {}
    for values in reader:
        if not values:
            continue
        digits = _WHOLE.fullmatch(values[number]) if len(values) == len(header) else None
        if not digits:
            raise UserError(f"{path}, line {reader.line_num}: expected an id and its {ROW}, a number from 0")
        row = int(digits[1])
        if row in names:
            raise UserError(f"{path}, line {reader.line_num}: {ROW} {row} is duplicated; every id has its own row")
        names[row] = _id(f"{path}, line {reader.line_num}", values[name])
    if sorted(names) != list(range(len(names))):
        gap = next(row for row in range(len(names)) if row not in names)
        raise UserError(
            f"{path}: {len(names)} ids, but none has {ROW} {gap}; rows are numbered from 0 without a gap, so the "
            "items of the vectors cannot be determined"
        )
    return [names[row] for row in range(len(names))]


def _of_interactions(path: Path, file: BinaryIO) -> list[bytes]:
    try:
        table = pa_csv.read_csv(
            file,
            parse_options=pa_csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=pa_csv.ConvertOptions(
                include_columns=[ROW], column_types={ROW: pa.float64()}, null_values=[]
            ),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: the column {ROW} is unreadable ({error})") from error
    numbers = table.column(ROW).to_numpy()
    wrong = np.flatnonzero(~((numbers >= 0) & (numbers < _ITEMS) & (numbers % 1 == 0)))
    if len(wrong):
        raise UserError(f"{path}: {ROW} = {numbers[wrong[0]]:g} is not a number of an item; items are numbered from 0")
    largest = int(np.max(numbers, initial=-1))
    return [str(row).encode() for row in range(largest + 1)]
