"""Gzip files: errors, limits on the unpacked size, and a check of a whole file in constant memory."""

import zlib
from pathlib import Path
from typing import Any

from isal import igzip, isal_zlib

GZIP_ERRORS: tuple[Any, ...] = (EOFError, zlib.error, isal_zlib.error, igzip.BadGzipFile)
"""Exceptions of a damaged gzip stream."""
UNPACKED_RATIO = 200
"""Text unpacks to 3 to 30 times its gzip size; a file that unpacks to more than this is rejected as a gzip bomb ..."""
UNPACKED_FREE = 1 << 30
"""... unless its unpacked size in bytes is below this, as for a file of one repeated line."""

_BLOCK = 1 << 20


class DamagedGzipError(Exception):
    """Not a gzip file, truncated, a wrong checksum, or other bytes after its end."""


class GzipBombError(Exception):
    """The file unpacks to far more than a data set of its size would."""


def check_gzip(path: Path) -> int:
    """Read a gzip file to its end and return the number of unpacked bytes. It may have several members.

    Raises:
        DamagedGzipError: it is not a complete gzip file.
        GzipBombError: it unpacks to more than UNPACKED_FREE bytes and more than UNPACKED_RATIO times its own size;
            reading stops there.
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
                    raise GzipBombError(f"{packed} bytes unpack to more than {most}: a gzip bomb, not data")
    except GZIP_ERRORS as error:
        raise DamagedGzipError(f"damaged gzip ({error})") from None
    return unpacked
