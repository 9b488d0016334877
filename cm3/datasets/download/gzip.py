"""Integrity check of a gzip file: reads it to its end in constant memory."""

from pathlib import Path

from isal import igzip

from cm3.datasets.files.lines import GZIP_ERRORS, UNPACKED_FREE, UNPACKED_RATIO

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
