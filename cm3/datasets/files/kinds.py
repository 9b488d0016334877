"""Kinds of files that are given in place of a text table, recognised by their first bytes."""

import re
from pathlib import Path

from cm3.common.errors import UserError

_PAGE = re.compile(rb"\s*<(!doctype html|html)\b", re.IGNORECASE)
_EXPORT = "save the table as CSV"
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "an Excel file or a zip archive", f"{_EXPORT}, or unpack it"),
    (b"\xd0\xcf\x11\xe0", "an Excel file", _EXPORT),
    (b"SQLite format 3\0", "an SQLite database", _EXPORT),
    (b"\x89HDF\r\n", "an HDF5 file", _EXPORT),
    (b"ARROW1\0\0", "an Arrow or Feather file", "save the table as Parquet or CSV"),
    (b"Obj\x01", "an Avro file", "save the table as Parquet or CSV"),
    (b"\x80\x04\x95", "a Python pickle", "save the table as Parquet or CSV"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it, or compress it with gzip"),
    (b"\xfd7zXZ\0", "compressed with xz", "unpack it, or compress it with gzip"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"BZh", "compressed with bzip2", "unpack it, or compress it with gzip"),
)
"""First bytes of files that are not text, with what they are and what to do."""
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def check_kind(path: Path) -> None:
    """Raise UserError with the kind of a file that is known not to be text."""
    with path.open("rb") as file:
        first = file.read(512)
        if first.startswith(b"PAR1"):
            file.seek(-4, 2)
            if file.read(4) == b"PAR1":
                raise UserError(
                    f"{path}: is a Parquet file, not text; give it the suffix .parquet, or set format: parquet"
                )
    if _PAGE.match(first):
        raise UserError(f"{path}: is an HTML page, not a table; download or export the file again")
    for start, kind, advice in _KINDS:
        if first.startswith(start) and (start != b"BZh" or _BZIP2.match(first)):
            raise UserError(f"{path}: is {kind}, not text; {advice}")


def is_utf16(path: Path) -> bool:
    """Return whether a file begins with the mark of UTF-16 text."""
    with path.open("rb") as file:
        return file.read(2) in _UTF16


def check_header(path: Path, line: bytes) -> None:
    """Raise UserError if the first line of a file shows UTF-16 text, or line ends that are not read."""
    if line.startswith(_UTF16):
        raise UserError(f"{path}: is UTF-16 text; save it as UTF-8")
    if b"\r" in line.rstrip(b"\r"):
        raise UserError(
            f"{path}: its lines end with a carriage return alone, as on old Macs; save it with other line ends"
        )
