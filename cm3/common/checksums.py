"""Checksums within files: a key of a JSON record or of a tensor file's metadata, and a block in Parquet files.

A JSON record has the sha256 of its values, and a safetensors file that of all its bytes, with zeros in the checksum's place.

Parquet's own checksums cover the data of pages. A block in front of the footer covers the rest of what a reader uses: the headers of all pages,
which hold those checksums, and the footer. Programs that do not know the block skip it.

    pages | offsets n x uint64 | lengths n x uint32 | sha256 | n uint64 | b"cm3check" | footer | its length, b"PAR1"

The sha256 is of the offsets, the lengths, the n page headers that they locate, the footer and the end of the file.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cm3.common.errors import DamagedFileError

KEY = "checksum"
"""Key of a record's checksum."""
PARQUET_KEY = "cm3.checksum"
"""Key in the footer of a Parquet file that has a block of checksums."""
PREFIX = "cm3-sha256:"
"""Beginning of a record's checksum."""

_BLOCK = 2**20
_LONGEST_HEADER = 10**8  # the limit of the format
_DIGITS = 64
NO_CHECKSUM = PREFIX + "0" * _DIGITS

_MAGIC = b"cm3check"
_END = 8  # length of the footer and b"PAR1"
_FIXED = 32 + 8 + len(_MAGIC)  # of the block: sha256, n, b"cm3check"


def with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of JSON values with a checksum of them as its last key."""
    values = {name: value for name, value in record.items() if name != KEY}
    return values | {KEY: _checksum(json.loads(json.dumps(values)))}


def verified(path: str | os.PathLike[str], record: dict[str, Any]) -> dict[str, Any]:
    """Return the record without its checksum; one that was stored without a checksum is returned as it is.

    Raises:
        DamagedFileError: the checksum is not that of the record.
    """
    stored = record.get(KEY)
    if stored is None:
        if any(isinstance(value, str) and value.startswith(PREFIX) for value in record.values()):
            raise DamagedFileError(path, f"the key of its {KEY} is altered")
        return record
    values = {name: value for name, value in record.items() if name != KEY}
    if stored != _checksum(values):
        raise DamagedFileError(path, "its content does not match its checksum")
    return values


def _checksum(values: dict[str, Any]) -> str:
    return PREFIX + hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def add_tensors_checksum(path: Path) -> None:
    """Replace `NO_CHECKSUM` in the header of a finished safetensors file by the checksum of the file."""
    with path.open("r+b") as file:
        place = _tensors_header(file).index(NO_CHECKSUM.encode()) + len(PREFIX)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(place)
        file.write(digest.encode())


def check_tensors(path: str | os.PathLike[str]) -> bool:
    """Return whether a safetensors file has a checksum, which is that of the file.

    Raises:
        DamagedFileError: it is another one, or the file is cut.
        OSError: the file is absent or cannot be read.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise DamagedFileError(path, f"cut to {size} bytes")
        header = _tensors_header(file)
        place = header.find(PREFIX.encode(), 8)
        if place < 0:
            return False
        place += len(PREFIX)
        digest = hashlib.sha256(header[:place] + b"0" * _DIGITS + header[place + _DIGITS :])
        # In blocks: pages of a map of the file would count as memory of this process.
        while block := file.read(_BLOCK):
            digest.update(block)
        if header[place : place + _DIGITS] != digest.hexdigest().encode():
            raise DamagedFileError(path, "its content does not match its checksum")
    return True


def _tensors_header(file: BinaryIO) -> bytes:
    """Read the length of the header and the header, at the beginning of a safetensors file."""
    start = file.read(8)
    return start + file.read(min(int.from_bytes(start, "little"), _LONGEST_HEADER))


def add_parquet_checksum(path: Path) -> None:
    """Insert the block of checksums into a finished Parquet file whose footer has `PARQUET_KEY`."""
    headers = list(_page_headers(path))
    offsets, lengths = np.array([o for o, _ in headers], "<u8"), np.array([n for _, n in headers], "<u4")
    index = offsets.tobytes() + lengths.tobytes()
    with path.open("r+b") as file:
        file.seek(-_END, os.SEEK_END)
        footer = int.from_bytes(file.read(4), "little") + _END
        start = file.seek(-footer, os.SEEK_END)
        tail = file.read()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            digest = _digest(content, index, headers, tail)
        file.seek(start)
        file.write(index + digest + len(headers).to_bytes(8, "little") + _MAGIC + tail)


def check_parquet(path: str | os.PathLike[str], pages: bool = True) -> None:
    """Compare a Parquet file's footer and page headers with its block of checksums; a file without one is not checked.

    The data of pages are checked while they are read, by `page_checksum_verification` of Arrow.

    Raises:
        DamagedFileError: they differ, or the file is cut.
        OSError: the file is absent or cannot be read.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 4 + _END:
            raise DamagedFileError(path, f"cut to {size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[-4:] != b"PAR1":
                raise DamagedFileError(path, "its end is missing or altered")
            stop = size - _END - int.from_bytes(content[-_END:-4], "little")
            if stop < 4:
                raise DamagedFileError(path, "the length of its footer is altered")
            tail = content[stop:]
            if stop < _FIXED or content[stop - len(_MAGIC) : stop] != _MAGIC:
                if PARQUET_KEY.encode() in tail or _MAGIC in tail:
                    raise DamagedFileError(path, "its block of checksums is altered")
                return
            digest, count = content[stop - _FIXED : stop - 16], int.from_bytes(content[stop - 16 : stop - 8], "little")
            start = stop - _FIXED - 12 * count
            if start < 4:
                raise DamagedFileError(path, "its block of checksums is altered")
            index = content[start : stop - _FIXED]
            offsets, lengths = np.frombuffer(index, "<u8", count), np.frombuffer(index, "<u4", count, 8 * count)
            headers = list(zip(offsets.tolist(), lengths.tolist(), strict=True))
            if _digest(content, index, headers, tail) != digest:
                raise DamagedFileError(path, "its page headers or its footer do not match their checksum")


def _digest(content: mmap.mmap, index: bytes, headers: list[tuple[int, int]], tail: bytes) -> bytes:
    digest = hashlib.sha256(index)
    for offset, length in headers:
        digest.update(content[offset : offset + length])
    digest.update(tail)
    return digest.digest()


def _page_headers(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the offset and length of each page header of a Parquet file."""
    import pyarrow.parquet as pq  # planning, and training without files, need none of it

    metadata = pq.read_metadata(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(column)
                at = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
                stop = at + chunk.total_compressed_size
                while at < stop:
                    after, size = _page_header(content, at)
                    yield at, after - at
                    at = after + size


# The part of Thrift's compact protocol that page headers use: fields of a struct, integers as variable-length zigzag.
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT = 1, 2, 3, 7, 8, 12
_COMPRESSED_PAGE_SIZE = 3


def _page_header(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Return the end of the page header at a position, and the size of the data that follow it."""
    size = field = 0
    while kind := data[at]:
        at += 1
        field += kind >> 4
        if kind & 15 in (5, 6) and field == _COMPRESSED_PAGE_SIZE:
            size, at = _varint(data, at)
            size >>= 1  # zigzag of a number that is not negative
        else:
            at = _skip(data, at, kind & 15)
    return at + 1, size


def _skip(data: mmap.mmap, at: int, kind: int) -> int:
    if kind in (_TRUE, _FALSE):
        return at
    if kind in (_BYTE, _DOUBLE):
        return at + (1 if kind == _BYTE else 8)
    if kind == _STRUCT:
        while inner := data[at]:
            at = _skip(data, at + 1, inner & 15)
        return at + 1
    length, at = _varint(data, at)
    return at + length if kind == _BINARY else at


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
