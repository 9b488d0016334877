"""Strict reader of csv and tsv rows with line numbers, and detection of unclosed quotes, which would merge lines."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cm3.common.errors import UserError
from cm3.datasets.download.gzip import GZIP_ERRORS
from cm3.datasets.files.lines import lines, open_bytes

_LONGEST_CELL = 1 << 24
_BLOCK = 1 << 24
_QUOTE = b'"'


def delimited_lines(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the first line, values) of the rows that are not blank; a quoted cell may span several lines.

    Raises:
        UserError: with the line: not UTF-8, damaged gzip, a cell that is too long, or invalid quotes.
    """
    csv.field_size_limit(_LONGEST_CELL)
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        first = 1
        try:
            for values in reader:
                if values:
                    yield first, values
                first = reader.line_num + 1
        except UnicodeDecodeError:
            raise UserError(
                f"{path}, line {_first_bad_utf8(path)}: not UTF-8 text; convert the file to UTF-8"
            ) from None
        except csv.Error as error:
            raise UserError(
                f"{path}, line {first}: {error}. A cell that begins with a quote must end with one, and quotes within it "
                'are doubled, as in "a 5"" mug"; fix the cell'
            ) from None
        except GZIP_ERRORS as error:
            raise UserError(
                f"{path}: damaged gzip after line {reader.line_num} ({error}); create the file again"
            ) from None


def _first_bad_utf8(path: Path) -> int:
    for number, line in lines(path):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 0


class QuoteCounter(io.RawIOBase):
    """A file that counts the quotes that are read.

    Attributes:
        quotes: number of quotes so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.quotes = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        data = self._file.read(size)
        if _QUOTE in data:
            self.quotes += data.count(_QUOTE)
        return data


def check_quotes(path: Path, delimiter: str, rows: int, quotes: int) -> None:
    """Read a file again with `delimited_lines` if a lenient reader may have merged lines because of an unclosed quote.

    Args:
        rows: number of rows that the lenient reader found, with the header.
        quotes: number of quotes in the file.

    Raises:
        UserError: as `delimited_lines`.
    """
    # The number of closed quotes is even; a cell that spans several lines gives fewer rows than lines.
    if quotes % 2 or (quotes and _count_lines(path) != rows):
        for _ in delimited_lines(path, delimiter):
            pass


def _count_lines(path: Path) -> int:
    count, ended = 0, True
    with open_bytes(path) as file:
        while block := file.read(_BLOCK):
            codes = np.frombuffer(block, np.uint8)
            ends = (codes == ord("\n")) | (codes == ord("\r"))
            count += int(np.count_nonzero(ends[:-1] & ~ends[1:])) + bool(ended and not ends[0])
            ended = bool(ends[-1])
    return count
