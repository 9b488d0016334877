"""Stage: one raw file from the first of its mirrors that gives it, byte for byte."""

import asyncio
import gzip
import hashlib
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from sources.web import USER_AGENT, BusyError, FetchError, check_status, reason, refuse_offline, trying
from stages.command import stage
from stages.errors import UserError
from stages.files import atomic
from stages.progress import Progress

log = logging.getLogger("sources.download")

_CHUNK = 1 << 20


def download(
    urls: Sequence[str],
    file: Path,
    sha256: str | None = None,
    size: int | None = None,
    attempts: int = 5,
    pause: float = 1.0,
    timeout: float = 60.0,
) -> dict[str, Any]:
    """Fetch `file` from the first URL that gives it whole.

    Size and checksum are compared where they are known, a gzip file is read to its end, and a web page in place of
    a data file is refused. 429, 5xx, timeouts and cut connections are tried again; other answers go on to the next
    mirror at once.

    Args:
        urls: http(s) mirrors, tried in order.
        sha256: 64 hex digits; size: bytes.
        attempts: tries of each URL.
        pause: seconds before the second try, doubled each time; a server's Retry-After is honoured.
        timeout: seconds without a byte.

    Returns:
        url, bytes and sha256 of what was fetched.

    Raises:
        UserError: no mirror gave the file, each with its reason; or CM3_OFFLINE is set. Nothing is left behind.
    """
    for url in urls:
        if urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"{url}: only http and https are fetched; mend the URL of {file}")
    refuse_offline(urls[0], file)
    return asyncio.run(_from_mirrors(urls, file, sha256, size, attempts, pause, timeout))


async def _from_mirrors(
    urls: Sequence[str], file: Path, sha256: str | None, size: int | None, attempts: int, pause: float, timeout: float
) -> dict[str, Any]:
    complaints = []
    async with aiohttp.ClientSession(
        auto_decompress=False,
        trust_env=True,
        headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
    ) as session:
        for url in urls:
            log.info("fetching %s", url)
            try:
                async for attempt in trying(attempts, pause, lambda why, url=url: log.warning("%s: %s", url, why)):  # type: ignore[misc]
                    with attempt:
                        return await _fetch(session, url, file, sha256, size)
            except (FetchError, BusyError, aiohttp.ClientError, TimeoutError) as error:
                complaints.append(f"{url}: {reason(error)}")
                log.warning("giving up on %s", complaints[-1])
    told = "\n  ".join(complaints)
    raise UserError(f"{file} could not be fetched:\n  {told}\nPut the file there yourself, or name another mirror")


async def _fetch(
    session: aiohttp.ClientSession, url: str, file: Path, sha256: str | None, size: int | None
) -> dict[str, Any]:
    with atomic(file) as temporary:
        digest, count, shown = hashlib.sha256(), 0, 0
        async with session.get(url) as response:
            check_status(response)
            length = response.content_length or 0
            if size is not None and length and length != size:
                raise FetchError(f"has {length} bytes and not {size}")
            with temporary.open("wb") as out, Progress(-(-length // 1_000_000), "MB") as progress:
                async for chunk in response.content.iter_chunked(_CHUNK):
                    if not count:
                        _check_start(chunk, file, response.content_type)
                    out.write(chunk)
                    digest.update(chunk)
                    count += len(chunk)
                    progress.advance(count // 1_000_000 - shown)
                    shown = count // 1_000_000
        if not count:
            raise BusyError("an empty answer")
        if size is not None and count != size:
            raise BusyError(f"gave {count} bytes and not {size}")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise FetchError(f"sha256 is {digest.hexdigest()} and not {sha256}: another file, or a damaged one")
        if file.suffix == ".gz":
            await asyncio.to_thread(_check_gzip, temporary)
    log.info("%s: %d bytes from %s", file, count, url)
    return {"url": url, "bytes": count, "sha256": digest.hexdigest()}


def _check_start(chunk: bytes, file: Path, content_type: str) -> None:
    if file.suffix == ".gz":
        if not chunk.startswith(b"\x1f\x8b"):
            raise FetchError(f"no gzip file; it starts with {chunk[:40]!r}")
    elif content_type == "text/html" or chunk[:256].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise FetchError(f"a web page, not the file; it starts with {chunk[:40]!r}")


def _check_gzip(path: Path) -> None:
    try:
        with gzip.open(path) as packed:
            while packed.read(_CHUNK):
                pass
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BusyError(f"damaged gzip ({error})") from None


def main() -> None:
    """Spec: urls, sha256, size. Runtime: attempts, pause, timeout. Output: file, record."""
    with stage("sources.download") as call:
        spec = call.spec
        patience = {name: call.runtime[name] for name in ("attempts", "pause", "timeout") if name in call.runtime}
        facts = download(spec["urls"], call.outputs["file"], spec.get("sha256"), spec.get("size"), **patience)
        call.record.update(facts)


if __name__ == "__main__":
    main()
