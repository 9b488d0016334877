"""Whether a gzip file is whole, read to its end in constant memory."""

from pathlib import Path

from isal import igzip

from cm3.datasets.files.lines import GZIP_ERRORS, UNPACKED_FREE, UNPACKED_RATIO

_BLOCK = 1 << 20


class DamagedGzipError(Exception):
    """The file is no gzip file, is cut short, fails its checksum, or has something else behind its end."""


class GzipBombError(Exception):
    """The file unpacks to so much more than it holds that it is no data set."""


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
