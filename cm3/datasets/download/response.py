"""HTTP response checks: Content-Range, validators for resuming, and rejection of HTML error pages."""

import re
from collections.abc import Mapping
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

from cm3.common.gzip import GZIP_MAGIC
from cm3.common.http import FetchError

HEAD_BYTES = 512
"""Bytes needed to tell a data file from a web page."""
_MAGIC = {".gz": GZIP_MAGIC, ".zip": b"PK", ".parquet": b"PAR1"}


class ContentRange(NamedTuple):
    """First byte and total bytes of a Content-Range header; None where the header does not say."""

    start: int | None
    total: int | None


def content_range(headers: Mapping[str, str]) -> ContentRange:
    """Parse the Content-Range header of a 206 (`bytes 7-9/10`) or of a 416 (`bytes */10`) response."""
    found = re.fullmatch(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18}|\*)", headers.get("Content-Range", ""))
    start, total = found.groups() if found else (None, None)
    return ContentRange(None if start is None else int(start), None if total in (None, "*") else int(total))


def content_length(headers: Mapping[str, str]) -> int | None:
    """Return Content-Length in bytes, None where there is none."""
    value = headers.get("Content-Length", "")
    return int(value) if re.fullmatch(r"\d{1,18}", value) else None


def validator_of(headers: Mapping[str, str]) -> str | None:
    """Return what identifies the version of a file byte for byte, for If-Range: a strong ETag, else Last-Modified.

    A Last-Modified counts if it is at least one second older than Date: a file may change twice within the second that
    it resolves (RFC 9110, 8.8.2.2). None without a usable one.
    """
    etag, modified = headers.get("ETag", ""), headers.get("Last-Modified", "")
    if re.fullmatch(r'"[!#-~]*"', etag):
        return etag
    try:
        age = parsedate_to_datetime(headers.get("Date", "")) - parsedate_to_datetime(modified)
    except (ValueError, TypeError):
        return None
    return modified if age >= timedelta(seconds=1) else None


def check_start(head: bytes, file: Path, headers: Mapping[str, str]) -> None:
    """Raise FetchError if a response cannot be the file: an HTML page, a JSON message, or a compressed body.

    Args:
        head: the first HEAD_BYTES of the body, or all of a shorter one.
        file: its suffix says which format is expected.
    """
    if magic := _MAGIC.get(file.suffix):
        if not head.startswith(magic):
            kind = "gzip" if file.suffix == ".gz" else file.suffix[1:]
            raise FetchError(f"not a {kind} file; it starts with {head[:40]!r}")
        return
    if (encoding := headers.get("Content-Encoding", "identity").lower()) != "identity":
        raise FetchError(f"compressed ({encoding}), although requested without compression")
    content_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    page = start.startswith((b"<!doctype html", b"<html")) or (start.startswith(b"<?xml") and file.suffix != ".xml")
    if content_type == "text/html" or page:
        raise FetchError(f"a web page, not the file; it starts with {head[:40]!r}")
    if content_type == "application/json" and file.suffix in (".csv", ".tsv") and start.startswith(b"{"):
        raise FetchError(f"a JSON message, not the file; it starts with {head[:40]!r}")
