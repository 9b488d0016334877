"""Strict reader of csv and tsv rows with line numbers, and detection of unclosed quotes, which would merge lines."""

import codecs
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from cm3.common.errors import UserError
from cm3.datasets.download.gzip import GZIP_ERRORS
from cm3.datasets.files.kinds import is_utf16
from cm3.datasets.files.lines import lines, open_bytes

_LONGEST_CELL = 1 << 24
BLOCK_BYTES = 1 << 24
"""Bytes that are read at once to count lines."""
_QUOTE = b'"'


@dataclass(frozen=True)
class Dialect:
    """How a table of delimited text is written.

    Attributes:
        delimiter: character between cells.
        encoding: of the text.
        header: names of the columns of a file without a header; empty: the first row holds them.
        configurable: the config has keys for the attributes above, which messages then name.
    """

    delimiter: str
    encoding: str = "utf-8"
    header: tuple[str, ...] = ()
    configurable: bool = True

    def open(self, path: Path) -> BinaryIO:
        """Open a file as UTF-8 with a header. Raises UserError if it cannot be read."""
        file = open_bytes(path)
        if self.encoding == "utf-8" and not self.header:
            return file
        first = io.StringIO()
        if self.header:
            csv.writer(first, delimiter=self.delimiter, lineterminator="\n").writerow(self.header)
        return cast(BinaryIO, io.BufferedReader(_Recoded(file, self.encoding, first.getvalue().encode())))


class _Recoded(io.RawIOBase):
    """A text file as UTF-8, after some bytes of its own."""

    def __init__(self, file: BinaryIO, encoding: str, before: bytes) -> None:
        self._file, self._rest = file, before
        self._decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            data = self._file.read(BLOCK_BYTES)
            self._rest = self._decoder.decode(data, final=not data).encode()
            if not data:
                break
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def delimited_lines(path: Path, written: str | Dialect) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the first line, values) of the rows that are not blank; a quoted cell may span several lines.

    Args:
        path: the file.
        written: its delimiter, or how it is written; names of columns that it lacks come first, as line 0.

    Raises:
        UserError: with the line: not UTF-8, damaged gzip, a cell that is too long, or invalid quotes.
    """
    csv.field_size_limit(_LONGEST_CELL)
    dialect = written if isinstance(written, Dialect) else Dialect(written, configurable=False)
    added = int(bool(dialect.header))
    with dialect.open(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=dialect.delimiter, strict=True)
        first = 1 - added
        try:
            for values in reader:
                if values:
                    yield first, values
                first = reader.line_num + 1 - added
        except UnicodeDecodeError as error:
            if dialect.encoding != "utf-8":
                raise UserError(f"{path}: not {dialect.encoding} text ({error}); correct encoding") from None
            if is_utf16(path):
                key = ", or set encoding: utf-16 next to path" if dialect.configurable else ""
                raise UserError(f"{path}: is UTF-16 text; save it as UTF-8{key}") from None
            key = ", or set its encoding, such as encoding: cp1252" if dialect.configurable else ""
            raise UserError(
                f"{path}, line {_first_bad_utf8(path)}: not UTF-8 text; convert the file to UTF-8{key}"
            ) from None
        except csv.Error as error:
            raise UserError(
                f"{path}, line {first}: {error}. A cell that begins with a quote must end with one, and quotes within it "
                'are doubled, as in "a 5"" mug"; fix the cell'
            ) from None
        except GZIP_ERRORS as error:
            raise UserError(
                f"{path}: damaged gzip after line {reader.line_num - added} ({error}); create the file again"
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


def check_quotes(path: Path, dialect: Dialect, rows: int, quotes: int) -> None:
    """Read a file again with `delimited_lines` if a lenient reader may have merged lines because of an unclosed quote.

    Args:
        rows: number of rows that the lenient reader found, with the header.
        quotes: number of quotes in the file.

    Raises:
        UserError: as `delimited_lines`.
    """
    # The number of closed quotes is even; a cell that spans several lines gives fewer rows than lines.
    if quotes % 2 or (quotes and _count_lines(path, dialect) != rows):
        for _ in delimited_lines(path, dialect):
            pass


def _count_lines(path: Path, dialect: Dialect) -> int:
    count, ended = 0, True
    with dialect.open(path) as file:
        while block := file.read(BLOCK_BYTES):
            codes = np.frombuffer(block, np.uint8)
            ends = (codes == ord("\n")) | (codes == ord("\r"))
            count += int(np.count_nonzero(ends[:-1] & ~ends[1:])) + bool(ended and not ends[0])
            ended = bool(ends[-1])
    return count
