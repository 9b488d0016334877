"""Gzip files: detection by content, errors, limits on the unpacked size, and a check of a whole file."""

import zlib
from pathlib import Path
from typing import Any

from isal import igzip, isal_zlib

GZIP_MAGIC = b"\x1f\x8b"
GZIP_ERRORS: tuple[Any, ...] = (EOFError, zlib.error, isal_zlib.error, igzip.BadGzipFile)
"""Exceptions of a damaged gzip stream."""
UNPACKED_RATIO = 200
"""Text unpacks to 3 to 30 times its gzip size; a file that unpacks to more than this is rejected as a gzip bomb ..."""
UNPACKED_FREE = 1 << 30
"""... unless its unpacked size in bytes is below this, as for a file of one repeated line."""

_BLOCK = 1 << 20


class DamagedGzipError(Exception):
    """The file is no gzip file, is cut short, fails its checksum, or has something else behind its end."""


class GzipBombError(Exception):
    """The file unpacks to so much more than it holds that it is no data set."""


def is_gzip(path: Path) -> bool:
    """Return whether a file starts with the gzip signature, whatever its name.

    Raises:
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        return file.read(len(GZIP_MAGIC)) == GZIP_MAGIC


def check_gzip(path: Path) -> int:
    """Read a gzip file to its end and return the number of unpacked bytes. It may have several members.

    Raises:
        DamagedGzipError: it is not a whole gzip file.
        GzipBombError: it unpacks to more than both UNPACKED_FREE bytes and UNPACKED_RATIO times its own size; no more
            than that is read.
    """
    packed, unpacked = path.stat().st_size, 0
    if not packed:
        raise DamagedGzipError("the file is empty")
    most = max(UNPACKED_FREE, UNPACKED_RATIO * packed)
    try:
        with igzip.open(path, "rb") as file:
            while block := file.read(_BLOCK):
                unpacked += len(block)
                if unpacked > most:
                    raise GzipBombError(f"{packed} bytes unpack to more than {most}, which is no data but a gzip bomb")
    except GZIP_ERRORS as error:
        raise DamagedGzipError(f"damaged gzip ({error})") from None
    return unpacked
