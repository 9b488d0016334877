"""Stage: one raw file from the first of its mirrors that gives it, byte for byte."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from cm3.common.cli import stage
from cm3.common.errors import UserError
from cm3.common.progress import Progress
from cm3.datasets.download.client import (
    TRANSIENT,
    USER_AGENT,
    BusyError,
    FetchError,
    back_off,
    check_status,
    reason,
    refuse_offline,
)
from cm3.datasets.download.gzip import DamagedGzipError, GzipBombError, check_gzip
from cm3.datasets.download.partial import Partial, validator_of
from cm3.datasets.download.redirects import MirrorResolver, following
from cm3.datasets.download.response import HEAD, blocks, check_start, content_range

log = logging.getLogger("cm3.datasets.download.stage")

_CHUNK = 1 << 20
# A server that gives a little at a time is asked often, but not for ever.
_LITTLE, _MOST_TRIES_FOR_LITTLE = 1_000_000, 100


def download(
    urls: Sequence[str],
    file: Path,
    sha256: str | None = None,
    size: int | None = None,
    attempts: int = 5,
    pause: float = 1.0,
    timeout: float = 60.0,
    slowest: float = 1000.0,
) -> dict[str, Any]:
    """Fetch `file` from the first URL that gives it whole.

    Size and checksum are compared where they are known, a gzip file is read to its end, and a web page in place of
    a data file is refused. 429, 5xx, timeouts and cut connections are tried again; other answers go on to the next
    mirror at once. Bytes that have arrived are kept in a hidden file beside `file`, and a later try, also one of
    another process, asks for the rest alone where the server can tell that the rest belongs to them (a strong ETag,
    a Last-Modified) or `sha256` can.

    Args:
        urls: http(s) mirrors, tried in order; one that a part of the file came from is tried first.
        sha256: 64 hex digits; size: bytes.
        attempts: tries in a row of each URL that bring nothing new.
        pause: seconds before the second try, doubled each time; a server's Retry-After is honoured.
        timeout: seconds without a byte.
        slowest: bytes a second; less than that, over `timeout` seconds, is as good as nothing.

    Returns:
        url, bytes and sha256 of what was fetched.

    Raises:
        UserError: no mirror gave the file, each with its reason; the disk is full; or CM3_OFFLINE is set. Nothing is
            left behind but a part that the next call can build on.
    """
    for url in urls:
        if urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"{url}: only http and https are fetched; mend the URL of {file}")
    refuse_offline(urls[0], file)
    with Partial(file, checked=sha256 is not None) as partial:
        return asyncio.run(_Download(partial, sha256, size, attempts, pause, timeout, slowest).from_mirrors(urls))


class _DoubtError(BusyError):
    """What arrived is not the file, and it may be our piecing together or a rare mishap: to be fetched anew, once."""


class _Download:
    def __init__(
        self,
        partial: Partial,
        sha256: str | None,
        size: int | None,
        attempts: int,
        pause: float,
        timeout: float,
        slowest: float,
    ) -> None:
        self.partial, self.sha256, self.size = partial, sha256 and sha256.lower(), size
        self.attempts, self.pause, self.timeout, self.slowest = attempts, pause, timeout, slowest
        self.doubted: set[str] = set()

    async def from_mirrors(self, urls: Sequence[str]) -> dict[str, Any]:
        complaints = []
        if self.partial.url not in urls:
            self.partial.discard()
        for url in sorted(urls, key=lambda url: url != self.partial.url):
            log.info("fetching %s", url)
            try:
                return await self._from_mirror(url)
            # ValueError: an address or a header that cannot be one.
            except (FetchError, *TRANSIENT, aiohttp.ClientError, ValueError) as error:
                improper = "no proper HTTP answer: " if isinstance(error, aiohttp.ClientResponseError) else ""
                complaints.append(f"{url}: {improper}{reason(error)}")
                log.warning("giving up on %s", complaints[-1])
        raise UserError(self._told(complaints))

    def _told(self, complaints: Sequence[str]) -> str:
        told = "\n  ".join(complaints)
        kept = ""
        if self.partial.resumable:
            kept = f"{self.partial.told()} are kept: run the same command again to go on from there. Or else:\n"
        return (
            f"{self.partial.file} could not be fetched:\n  {told}\n"
            f"{kept}Put the file there yourself, or name another mirror"
        )

    def _reached(self, url: str) -> int:
        return self.partial.length if self.partial.url == url and self.partial.resumable else 0

    async def _from_mirror(self, url: str) -> dict[str, Any]:
        # One session for each, so that no mirror can lead to what only another may: addresses, connections, cookies.
        self.resolver = MirrorResolver(url)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=self.resolver),
            auto_decompress=False,
            trust_env=True,
            headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.timeout, sock_read=self.timeout),
            read_bufsize=_CHUNK,
        ) as self.session:
            return await self._tries(url)

    async def _tries(self, url: str) -> dict[str, Any]:
        failures = little = 0
        furthest = self._reached(url)
        while True:
            began = time.monotonic()
            try:
                if not self._reached(url) or self.partial.length != self.partial.total:
                    await self._receive(url)
                return self._finish(url)
            except TRANSIENT as error:
                gained, seconds = self._reached(url) - furthest, time.monotonic() - began
                furthest = max(furthest, self._reached(url))
                # A stall after a few bytes is no progress.
                if gained > 0 and (seconds < self.timeout or gained >= self.slowest * seconds):
                    failures = 0
                elif isinstance(error, _DoubtError):
                    failures = furthest = 0
                else:
                    failures += 1
                little += gained < _LITTLE
                if failures >= self.attempts or little >= _MOST_TRIES_FOR_LITTLE:
                    raise
                wait = back_off(max(failures, 1), self.pause, error)
                count = f"try {failures + 1} of {self.attempts}" if failures else "going on"
                log.warning("%s: %s; %s in %.1f s", url, reason(error), count, wait)
                await asyncio.sleep(wait)

    async def _receive(self, url: str) -> None:
        partial, headers = self.partial, {}
        if offset := self._reached(url):
            headers["Range"] = f"bytes={offset}-"
            if partial.validator is not None:
                headers["If-Range"] = partial.validator
        async with following(self.session, url, headers, self.resolver, self.timeout) as response:
            if offset and response.status == 416:
                self._nothing_left(response)
            elif offset and response.status == 206:
                self._goes_on(response)
                log.info("%s: resuming at %s", url, partial.told())
                await self._stream(b"", blocks(response, self.timeout, self.slowest))
            else:
                if offset:
                    log.info("%s: cannot be resumed, or has changed; starting again", url)
                await self._from_start(url, response)

    def _nothing_left(self, response: aiohttp.ClientResponse) -> None:
        total = content_range(response.headers).total
        if total != self.partial.length or not self.partial.fits(response.headers, total):
            self.partial.discard()
            raise BusyError("there is no rest of what was here, starting again (HTTP 416)")
        self.partial.total = total

    def _goes_on(self, response: aiohttp.ClientResponse) -> None:
        partial, (start, total) = self.partial, content_range(response.headers)
        if start != partial.length or not partial.fits(response.headers, total):
            partial.discard()
            raise BusyError("the rest does not fit what was here, starting again")
        partial.total = partial.total if total is None else total
        partial.resumed = True

    async def _from_start(self, url: str, response: aiohttp.ClientResponse) -> None:
        partial = self.partial
        try:
            check_status(response)
            total = response.content_length
            if self.size is not None and total is not None and total != self.size:
                raise FetchError(f"has {total} bytes and not {self.size}")
        except FetchError:
            self._discard(url)
            raise
        body = blocks(response, self.timeout, self.slowest)
        head = b""
        async for block in body:
            head += block
            if len(head) >= HEAD:
                break
        if not head:
            raise BusyError("an empty answer")
        # What is here already is dropped only now that something better is.
        check_start(head, partial.file, response.headers, response.content_type)
        partial.restart(url, validator_of(response.headers), total)
        await self._stream(head, body)

    async def _stream(self, head: bytes, body: AsyncIterator[bytes]) -> None:
        partial = self.partial
        shown = partial.length // 1_000_000
        with Progress(-(-(partial.total or 0) // 1_000_000), "MB", start=shown) as progress:
            self._append(head)
            async for block in body:
                self._append(block)
                progress.advance(partial.length // 1_000_000 - shown)
                shown = partial.length // 1_000_000

    def _append(self, block: bytes) -> None:
        self.partial.append(block)
        if self.size is not None and self.partial.length > self.size:
            self.partial.discard()
            raise FetchError(f"has more than {self.size} bytes")

    def _finish(self, url: str) -> dict[str, Any]:
        partial = self.partial
        count, sha256 = partial.length, partial.digest.hexdigest()
        if partial.total is not None and count < partial.total:
            raise BusyError(f"the connection was cut after {partial.told()}")
        wanted = partial.total if self.size is None else self.size
        if wanted is not None and count != wanted:
            if partial.total is None and count < wanted:
                raise BusyError(f"gave {count} bytes and not {wanted}")
            partial.discard()
            raise FetchError(f"has {count} bytes and not {wanted}")
        self._check(url, sha256)
        partial.publish()
        log.info("%s: %d bytes from %s", partial.file, count, url)
        return {"url": url, "bytes": count, "sha256": sha256}

    def _check(self, url: str, sha256: str) -> None:
        partial = self.partial
        if self.sha256 is not None and sha256 != self.sha256:
            told, again = f"sha256 is {sha256} and not {self.sha256}: another file, or a damaged one", partial.resumed
        elif partial.file.suffix == ".gz":
            try:
                check_gzip(partial.path)
                return
            except GzipBombError as error:
                told, again = str(error), False
            except DamagedGzipError as error:
                if partial.total is None:  # Nobody said how long it is, so that it may as well have been cut.
                    raise BusyError(str(error)) from None
                told, again = str(error), True
        else:
            return
        partial.discard()
        if not again or url in self.doubted:
            raise FetchError(told)
        self.doubted.add(url)
        raise _DoubtError(told)

    def _discard(self, url: str) -> None:
        if self.partial.url == url:
            self.partial.discard()


def main() -> None:
    """Spec: urls, path, sha256, size. Runtime: attempts, pause, timeout, slowest. Output: file, record."""
    with stage("cm3.datasets.download.stage") as call:
        spec = call.spec
        patience = {
            name: call.runtime[name] for name in ("attempts", "pause", "timeout", "slowest") if name in call.runtime
        }
        facts = download(spec["urls"], call.outputs["file"], spec.get("sha256"), spec.get("size"), **patience)
        call.record.update(facts)


if __name__ == "__main__":
    main()
