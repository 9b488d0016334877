"""Lines of large text files, plain or gzip, in constant memory whatever the file claims to be."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from isal import igzip, igzip_threaded, isal_zlib

from cm3.common.errors import UserError
from cm3.common.gzip import is_gzip

LONGEST_LINE = 32_000_000
"""Bytes; a longer line is no line of a data set."""
UNPACKED_RATIO = 200
"""Text unpacks to 3 to 30 times its gzip size; a file that promises more is a bomb ..."""
UNPACKED_FREE = 1 << 30
"""... unless it is small unpacked, as a file of one repeated line is."""

_BLOCK = 4 << 20
GZIP_ERRORS: tuple[Any, ...] = (EOFError, zlib.error, isal_zlib.error, igzip.BadGzipFile)


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading; gzip is told by its first bytes, not by its name, and unpacked by another thread.

    Raises:
        UserError: there is no such file.
    """
    try:
        packed = is_gzip(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    return cast(BinaryIO, igzip_threaded.open(path, "rb")) if packed else path.open("rb")


def line_blocks(path: Path) -> Iterator[tuple[int, list[bytes]]]:
    """Yield (number of the first line, from 1; lines without their ends) of a few megabytes at a time.

    Raises:
        UserError: no such file; the gzip stream is damaged, cut short or a bomb; a line is longer than LONGEST_LINE.
    """
    most = max(UNPACKED_FREE, UNPACKED_RATIO * path.stat().st_size) if path.is_file() else 0
    number, read, rest = 1, 0, b""
    try:
        with open_bytes(path) as file:
            while block := file.read(_BLOCK):
                read += len(block)
                if read > most:
                    raise UserError(
                        f"{path}: unpacks to more than {UNPACKED_RATIO} times its size, which no text does; "
                        "fetch the file again"
                    )
                found = (rest + block).split(b"\n")
                rest = found.pop()
                if len(rest) > LONGEST_LINE:
                    raise UserError(f"{path}, line {number + len(found)}: is longer than {LONGEST_LINE} bytes")
                if found:
                    yield number, found
                number += len(found)
    except GZIP_ERRORS as error:
        raise UserError(f"{path}: damaged gzip, in or after line {number} ({error}); fetch the file again") from None
    if rest:
        yield number, [rest]


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line without blanks around it); blank lines are left out.

    Raises:
        UserError: as `line_blocks`.
    """
    for first, block in line_blocks(path):
        for number, line in enumerate(block, first):
            if stripped := line.strip():
                yield number, stripped
