"""Lines of large text files, plain or gzip, in constant memory whatever the file's contents."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from isal import igzip_threaded

from cm3.common.errors import UserError
from cm3.common.gzip import is_gzip
from cm3.common.input_files import check_readable
from cm3.datasets.download.gzip import GZIP_ERRORS, UNPACKED_FREE, UNPACKED_RATIO
from cm3.datasets.files.kinds import check_kind

LONGEST_LINE = 32_000_000
"""Bytes; a longer line is an error."""

BLOCK_BYTES = 4 << 20
"""Bytes that are read at once."""


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading; gzip is detected by content, not by name, and decompressed in another thread.

    Raises:
        UserError: the file does not exist, is a folder, cannot be read, or is not text, such as an Excel file.
    """
    check_readable(path)
    check_kind(path)
    return cast(BinaryIO, igzip_threaded.open(path, "rb")) if is_gzip(path) else path.open("rb")


def line_blocks(path: Path) -> Iterator[tuple[int, list[bytes]]]:
    """Yield (number of the first line, from 1; lines without their ends), a few megabytes at a time.

    Raises:
        UserError: the file does not exist or cannot be read; the gzip stream is damaged, truncated or a bomb; a line is longer than
            LONGEST_LINE.
    """
    limit = max(UNPACKED_FREE, UNPACKED_RATIO * path.stat().st_size) if path.is_file() else 0
    number, read, rest = 1, 0, b""
    try:
        with open_bytes(path) as file:
            while block := file.read(BLOCK_BYTES):
                read += len(block)
                if read > limit:
                    raise UserError(
                        f"{path}: unpacks to more than {UNPACKED_RATIO} times its size, which is not text; "
                        "download the file again"
                    )
                complete = (rest + block).split(b"\n")
                rest = complete.pop()
                if len(rest) > LONGEST_LINE:
                    raise UserError(f"{path}, line {number + len(complete)}: is longer than {LONGEST_LINE} bytes")
                if complete:
                    yield number, complete
                number += len(complete)
    except GZIP_ERRORS as error:
        raise UserError(f"{path}: damaged gzip, in or after line {number} ({error}); download the file again") from None
    if rest:
        yield number, [rest]


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line without surrounding white space) of the lines that are not blank.

    Raises:
        UserError: as `line_blocks`.
    """
    for first, block in line_blocks(path):
        for number, line in enumerate(block, first):
            if stripped := line.strip():
                yield number, stripped
