"""Append-only journal of downloaded images, read back after a kill as far as its records are complete.

A record is a line of JSON with its CRC-32, then the image's bytes. The file is not synced to disk: a record is accepted
only if its CRC and the image's sha256 match, so neither a kill nor a power cut leaves bytes that could be mistaken for
an image. It works on every file system, which SQLite's WAL mode does not (network file systems), and writes each image
once.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cm3.common.errors import UserError

log = logging.getLogger("cm3.datasets.images")

_LONGEST_LINE = 1 << 18


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its JSON object, and offset and length of the image's bytes (length 0: none)."""

    fields: dict[str, Any]
    start: int
    length: int


class Journal:
    """The journal file at `path`; one process writes it, and `append` is called by one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open the file; records are appended after the last complete one, the rest is cut off."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[Record] = []
        """Complete records that an earlier process wrote."""
        self._end = 0
        if path.exists():
            for record, end in _complete_records(path):
                self.records.append(record)
                self._end = end
            if rest := path.stat().st_size - self._end:
                log.warning(
                    "%s: its last %d bytes are cut or damaged; the images in them are downloaded again", path, rest
                )
                os.truncate(path, self._end)
        self._file = path.open("ab")
        self._reader = os.open(path, os.O_RDONLY)

    def append(self, fields: dict[str, Any], data: bytes) -> Record:
        """Write a record; a process killed afterwards does not lose it.

        Args:
            fields: JSON object; with data, fields["outcome"]["sha256"] is the digest of `data`.

        Raises:
            UserError: the disk is full, or another write error.
        """
        line = json.dumps({**fields, "length": len(data)}).encode()
        head = b"%08x " % zlib.crc32(line) + line + b"\n"
        try:
            self._file.write(head + data + b"\n")
            self._file.flush()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise UserError(
                f"{self.path}: {error.strerror or error}{'; make room and' if full else ':'} run the same command "
                "again, downloaded images are kept"
            ) from error
        record = Record(fields, self._end + len(head), len(data))
        self._end += len(head) + len(data) + 1
        return record

    def read(self, start: int, length: int) -> bytes:
        """Return the bytes of an image."""
        return os.pread(self._reader, length, start)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # a full disk, which `append` has reported
            self._file.close()
        os.close(self._reader)


def _complete_records(path: Path) -> Iterator[tuple[Record, int]]:
    """Yield the records before the first damaged or incomplete one, each with the offset of its end."""
    with path.open("rb") as file:
        while (record := _read_record(file)) is not None:
            yield record, file.tell()


def _read_record(file: BinaryIO) -> Record | None:
    line = file.readline(_LONGEST_LINE)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if line.endswith(b"\n") and int(line[:8], 16) == zlib.crc32(line[9:-1]):
            fields: dict[str, Any] = json.loads(line[9:])
            start, length = file.tell(), fields["length"]
            data = file.read(length + 1)
            if len(data) == length + 1 and data.endswith(b"\n"):
                if length and hashlib.sha256(data[:-1]).hexdigest() != fields["outcome"]["sha256"]:
                    return None
                return Record(fields, start, length)
    return None
