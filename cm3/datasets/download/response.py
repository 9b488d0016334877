"""Reading what a mirror answers: its bytes until the connection ends, which part they are, whether they are a file."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import NamedTuple

import aiohttp

from cm3.datasets.download.client import TRANSIENT, BusyError, FetchError

HEAD = 512
"""So many bytes tell a file from a web page."""
_MAGIC = {".gz": b"\x1f\x8b", ".zip": b"PK", ".parquet": b"PAR1"}


class ContentRange(NamedTuple):
    """What a Content-Range header says, in bytes; None where it leaves something open."""

    start: int | None
    total: int | None


def content_range(headers: Mapping[str, str]) -> ContentRange:
    """Read a Content-Range header: of a 206 (`bytes 7-9/10`) or of a 416 (`bytes */10`)."""
    found = re.fullmatch(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18}|\*)", headers.get("Content-Range", ""))
    start, total = found.groups() if found else (None, None)
    return ContentRange(None if start is None else int(start), None if total in (None, "*") else int(total))


async def blocks(response: aiohttp.ClientResponse, timeout: float, slowest: float) -> AsyncIterator[bytes]:
    """Yield the bytes of an answer as they come, also the last ones before a cut.

    Raises:
        BusyError: fewer than `slowest` bytes a second over `timeout` seconds.
        TimeoutError: not one byte for `timeout` seconds.
        aiohttp.ClientError: the connection was cut.
    """
    since, count = time.monotonic(), 0
    while True:
        try:
            # Of bytes of the body: the framing of chunks could keep sock_read waiting for ever.
            async with asyncio.timeout(timeout):
                block = await response.content.readany()
        except TRANSIENT:
            if rest := _arrived(response.content):
                yield rest
            raise
        if not block:
            if error := _reset(response):
                raise error
            return
        yield block
        count += len(block)
        if (elapsed := time.monotonic() - since) >= timeout:
            if count < slowest * elapsed:
                raise BusyError(f"too slow: {count} bytes in {elapsed:.0f} s")
            since, count = time.monotonic(), 0


def _reset(response: aiohttp.ClientResponse) -> BaseException | None:
    # Of a body that ends with its connection, aiohttp takes a reset for the end.
    told = response.content_length is not None or "Transfer-Encoding" in response.headers
    protocol = getattr(response, "_protocol", None)
    error = None if told or protocol is None else protocol.exception()
    return error if isinstance(error, aiohttp.ClientOSError) else None


def _arrived(stream: aiohttp.StreamReader) -> bytes:
    # aiohttp raises as soon as a connection is cut, with what arrived before still in its buffer. A line that is cut
    # every few kilobytes would never bring a byte without this; should the names change, it is slower, not wrong.
    buffer, offset = getattr(stream, "_buffer", ()), getattr(stream, "_buffer_offset", 0)
    return b"".join(buffer)[offset:]


def check_start(head: bytes, file: Path, headers: Mapping[str, str], content_type: str) -> None:
    """Raise FetchError unless an answer that starts with `head` can be the file: no web page, no message, not packed.

    Args:
        head: the first HEAD bytes, or all if there are fewer.
        file: says by its suffix what is wanted.
    """
    if magic := _MAGIC.get(file.suffix):
        if not head.startswith(magic):
            kind = "gzip" if file.suffix == ".gz" else file.suffix[1:]
            raise FetchError(f"no {kind} file; it starts with {head[:40]!r}")
        return
    if (packed := headers.get("Content-Encoding", "identity").lower()) != "identity":
        raise FetchError(f"comes packed ({packed}), though asked for as it is")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    page = start.startswith((b"<!doctype html", b"<html")) or (start.startswith(b"<?xml") and file.suffix != ".xml")
    if content_type == "text/html" or page:
        raise FetchError(f"a web page, not the file; it starts with {head[:40]!r}")
    if content_type == "application/json" and file.suffix in (".csv", ".tsv") and start.startswith(b"{"):
        raise FetchError(f"a message in JSON, not the file; it starts with {head[:40]!r}")
