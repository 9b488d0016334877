"""Format of RecBole's atomic files: tables with a header of names and types, such as user_id:token and price:float."""

import csv
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cm3.common.errors import UserError
from cm3.common.strict import nearest
from cm3.datasets.files.delimited import delimited_lines
from cm3.datasets.files.kinds import check_header
from cm3.datasets.files.lines import line_blocks
from cm3.datasets.reader import MalformedLines

log = logging.getLogger("cm3.datasets.recbole")

TYPES = ("token", "token_seq", "float", "float_seq")

USER, ITEM, RATING, TIME = ("user_id", "user"), ("item_id", "item"), ("rating",), ("timestamp",)
"""Usual names of the columns of interactions, in lower case: those of RecBole, then those of archives made from its files."""

ITEM_FIELDS: Mapping[str, Sequence[str]] = {
    "title": ("title", "item_name", "movie_title", "name"),
    "brand": ("brand",),
    "categories": ("categories", "category", "class", "genres", "genre"),
    "description": ("description",),
    "features": ("features", "feature"),
    "image": ("image", "image_url", "imurl"),
}
"""Usual names of an item's columns, in lower case; of several, the first that a file has is read."""


@dataclass(frozen=True)
class Header:
    """The columns of an atomic file.

    Attributes:
        path: the file.
        line: number of the header's line, from 1.
        names: as written, without their types.
        types: of `TYPES`, empty for a column without one.
    """

    path: Path
    line: int
    names: Sequence[str]
    types: Sequence[str]

    def find(self, name: str | None, usual: Sequence[str]) -> int | None:
        """Return the position of a column: of `name`, or of the first of the usual names; None without any of these.

        Raises:
            UserError: the file has no column `name`.
        """
        lower = [known.lower() for known in self.names]
        for candidate in usual if name is None else [name]:
            if candidate.lower() in lower:
                return lower.index(candidate.lower())
        if name is not None:
            raise UserError(f"{self.path}: has no column {name!r}{nearest(name, self.names)}")
        return None

    def require(self, name: str | None, usual: Sequence[str]) -> int:
        """Return the position of a column that must exist.

        Raises:
            UserError: it does not.
        """
        found = self.find(name, usual)
        if found is None:
            other = next((mark for mark in "\t,;| " if len(self.names) == 1 and mark in self.names[0]), None)
            if other:
                raise UserError(
                    f"{self.path}, line {self.line}: has one column, {self.names[0][:80]!r}; if the columns are separated by "
                    f"{other!r}, set field_separator: {json.dumps(other)}"
                )
            raise UserError(
                f"{self.path}, line {self.line}: has no column {usual[0]!r}{nearest(usual[0], self.names)}; the first line "
                f"must name the columns, such as {USER[0]}:token and {ITEM[0]}:token, or set columns in the configuration"
            )
        return found

    def is_sequence(self, column: int) -> bool:
        """Return whether the values of a column are sequences."""
        return self.types[column].endswith("_seq")


def parse_header(path: Path, number: int, line: bytes, separator: str) -> Header:
    """Return the header in a line.

    Raises:
        UserError: an unknown type, or a duplicate name.
    """
    check_header(path, line)
    text = line.decode(errors="replace").removeprefix("\ufeff").rstrip("\r")
    names, types = [], []
    for cell in (unquoted(cell.strip()) for cell in text.split(separator)):
        name, colon, kind = cell.rpartition(":")
        name, kind = name.strip(), kind.strip().lower()
        if not colon or kind not in TYPES:
            name, colon, kind = cell, "", ""
        if not colon and ":" in cell:
            raise UserError(f"{path}, line {number}: {cell[:80]!r}: unknown type; the types are {', '.join(TYPES)}")
        names.append(name)
        types.append(kind)
    lower = [name.lower() for name in names]
    twice = sorted({name for name in lower if name and lower.count(name) > 1})
    if twice:
        raise UserError(f"{path}, line {number}: duplicate column {twice[0]!r} in the header")
    return Header(path, number, names, types)


def read_header(path: Path, separator: str) -> Header:
    """Return the header of a file.

    Raises:
        UserError: the file is empty, or as `parse_header`.
    """
    for number, line in _plain_lines(path):
        return parse_header(path, number, line, separator)
    raise UserError(f"{path}: is empty")


def rows(path: Path, separator: str, width: int, faults: MalformedLines) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, values) of the rows below the header.

    Cells in quotes are read as pandas writes them, and may span several lines. A file that has quotes and cannot be read
    in this way, such as one with a title that begins with a quote and goes on after the next, is read line by line, with
    its quotes.

    Args:
        width: number of values; a line with another number is malformed.
        faults: gets the malformed lines.
    """
    if _is_quoted(path, separator, width):
        found: Iterator[tuple[int, list[str]]] = delimited_lines(path, separator)
    else:
        _warn_of_encoding(path)
        found = ((number, line.decode(errors="replace").split(separator)) for number, line in _plain_lines(path))
    next(found, None)
    for number, values in found:
        if len(values) == width:
            yield number, values
        else:
            faults.add(number, wrong_width(len(values), width, separator), separator.join(values).encode())


def wrong_width(found: int, width: int, separator: str) -> str:
    """Return the complaint about a line with another number of values than the header."""
    return f"has {found} values, the header has {width}; the separator is {separator!r} (field_separator)"


def _is_quoted(path: Path, separator: str, width: int) -> bool:
    try:
        return all(len(values) == width for _, values in delimited_lines(path, separator))
    except UserError:
        return False


def _warn_of_encoding(path: Path) -> None:
    for number, line in _plain_lines(path):
        try:
            line.decode()
        except UnicodeDecodeError:
            log.warning(
                "%s, line %d: not UTF-8 text; characters were replaced: convert the file to UTF-8", path, number
            )
            return


def _plain_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # `lines` removes white space around a line, which may be an empty value at its start or end.
    for first, block in line_blocks(path):
        for number, line in enumerate(block, first):
            if line.strip():
                yield number, line.rstrip(b"\r")


def unquoted(cell: str) -> str:
    """Return a cell without the quotes that pandas writes around it."""
    if len(cell) > 1 and cell[0] == cell[-1] == '"':
        return next(csv.reader([cell]), [cell])[0]
    return cell
