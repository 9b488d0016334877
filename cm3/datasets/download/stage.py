"""Stage: download one raw file, byte for byte, from the first of its mirrors that provides it."""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2

from cm3.common.cli import stage
from cm3.common.errors import UserError
from cm3.common.files import sha256_of
from cm3.common.http import (
    FetchError,
    TransientError,
    back_off,
    check_status,
    hide_secrets,
    is_offline,
    one_line,
    reveal,
    without_secrets,
)
from cm3.common.progress import Progress
from cm3.datasets.download.client import MirrorClient
from cm3.datasets.download.gzip import DamagedGzipError, GzipBombError, check_gzip
from cm3.datasets.download.partial import Partial
from cm3.datasets.download.response import HEAD_BYTES, check_start, content_length, content_range, validator_of
from cm3.datasets.raw_files import facts_of, read_record, stamp

log = logging.getLogger("cm3.datasets.download.stage")

# At most MOST_SMALL_GAINS requests to a server that sends less than SMALL_GAIN bytes per request.
SMALL_GAIN, MOST_SMALL_GAINS = 1_000_000, 100


def download(
    urls: Sequence[str],
    file: Path,
    sha256: str | None = None,
    size: int | None = None,
    attempts: int = 5,
    pause: float = 1.0,
    timeout: float = 60.0,
    slowest: float = 1000.0,
    place: Path | None = None,
) -> dict[str, Any]:
    """Download `file` from the first URL that provides it completely.

    Size and checksum are compared if given, a gzip file is read to its end, and an HTML page instead of a data file is
    rejected. 429, 5xx, timeouts and cut connections are retried; after any other error the next mirror is tried at
    once. Received bytes are kept in a hidden file next to `file`, and a later try, also of another process, requests
    only the rest (Range, If-Range) if a strong ETag, Last-Modified or `sha256` shows that it belongs to the same file.

    Args:
        urls: http(s) mirrors in order of preference; a mirror that part of the file came from is tried first.
        sha256: 64 hex digits; size: bytes.
        attempts: consecutive tries of each URL without new bytes.
        pause: seconds before the second try, doubled each time; a Retry-After of the server is followed.
        timeout: seconds without a byte.
        slowest: bytes per second; fewer over `timeout` seconds count as a failure.
        place: where users put the file themselves, for messages; default: `file`.

    Returns:
        url (without secrets), bytes and sha256 of the download.

    Raises:
        UserError: no mirror provided the file, with the reason for each; the disk is full; or CM3_OFFLINE is set.
            Nothing is left behind except a part that the next call can resume.
    """
    for url in urls:
        if url.partition("://")[0].lower() not in ("http", "https"):
            raise UserError(f"{without_secrets(url)}: only http and https are supported; correct the URL of {file}")
    if is_offline():
        raise UserError(
            f"CM3_OFFLINE is set, so nothing is downloaded: put the file {without_secrets(urls[0])} at {place or file} "
            "yourself"
        )
    with Partial(file, checked=sha256 is not None) as partial:
        return _Download(partial, sha256, size, attempts, pause, timeout, slowest, place or file).from_mirrors(urls)


class _SuspectError(TransientError):
    """The complete file is wrong, perhaps because its parts do not belong together: downloaded anew, once."""


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
        place: Path,
    ) -> None:
        self.partial, self.sha256, self.size = partial, sha256 and sha256.lower(), size
        self.attempts, self.pause, self.timeout, self.slowest = attempts, pause, timeout, slowest
        self.place = place
        self.suspected: set[str] = set()

    def from_mirrors(self, urls: Sequence[str]) -> dict[str, Any]:
        failures = []
        names = {url: without_secrets(url) for url in urls}
        if self.partial.url not in names.values():
            self.partial.discard()
        for url in sorted(urls, key=lambda url: names[url] != self.partial.url):
            log.info("downloading %s", names[url])
            try:
                with MirrorClient(url, self.timeout, self.slowest) as client:
                    return self._from_mirror(client)
            # InvalidURL and ValueError: an impossible address or header.
            except (FetchError, TransientError, httpx2.InvalidURL, ValueError) as error:
                failures.append(f"{names[url]}: {one_line(hide_secrets(str(error), url), 300)}")
                log.warning("giving up on %s", failures[-1])
        raise UserError(self._message(failures))

    def _message(self, failures: Sequence[str]) -> str:
        listed = "\n  ".join(failures)
        kept = ""
        if self.partial.resumable:
            kept = f"{self.partial.progress()} are kept: run the same command again to resume. Otherwise:\n"
        return (
            f"{self.partial.file} could not be downloaded:\n  {listed}\n"
            f"{kept}Put the file at {self.place} yourself, or configure another mirror"
        )

    def _offset(self, url: str) -> int:
        return self.partial.length if self.partial.url == url and self.partial.resumable else 0

    def _from_mirror(self, client: MirrorClient) -> dict[str, Any]:
        url = client.name
        failures = small_gains = 0
        furthest = self._offset(url)
        while True:
            began = time.monotonic()
            try:
                if not self._offset(url) or self.partial.length != self.partial.total:
                    self._receive(client)
                return self._finish(url)
            except TransientError as error:
                gained, seconds = self._offset(url) - furthest, time.monotonic() - began
                furthest = max(furthest, self._offset(url))
                # A few bytes before a stall do not count as progress.
                if gained > 0 and (seconds < self.timeout or gained >= self.slowest * seconds):
                    failures = 0
                elif isinstance(error, _SuspectError):
                    failures = furthest = 0
                else:
                    failures += 1
                small_gains += gained < SMALL_GAIN
                if failures >= self.attempts or small_gains >= MOST_SMALL_GAINS:
                    raise
                wait = back_off(max(failures, 1), self.pause, error)
                count = f"try {failures + 1} of {self.attempts}" if failures else "resuming"
                reason = hide_secrets(str(error), client.url)
                log.warning("%s: %s; %s in %.1f s", url, reason, count, wait)
                time.sleep(wait)

    def _receive(self, client: MirrorClient) -> None:
        partial, headers = self.partial, {}
        if offset := self._offset(client.name):
            headers["Range"] = f"bytes={offset}-"
            if partial.validator is not None:
                headers["If-Range"] = partial.validator
        with client.get(headers) as response:
            if offset and response.status_code == 416:
                self._accept_416(response)
            elif offset and response.status_code == 206:
                self._accept_206(response)
                log.info("%s: resuming at %s", client.name, partial.progress())
                self._write(b"", client.blocks(response))
            else:
                if offset:
                    log.info("%s: cannot be resumed, or has changed; starting again", client.name)
                self._start(client, response)

    def _accept_416(self, response: httpx2.Response) -> None:
        """Range not satisfiable: correct if the file is complete already."""
        total = content_range(response.headers).total
        if total != self.partial.length or not self.partial.matches(response.headers, total):
            self.partial.discard()
            raise TransientError("the server has no bytes after the kept part, starting again (HTTP 416)")
        self.partial.total = total

    def _accept_206(self, response: httpx2.Response) -> None:
        """Partial content: the rest of the file, if it is the rest of the same version."""
        partial, (start, total) = self.partial, content_range(response.headers)
        if start != partial.length or not partial.matches(response.headers, total):
            partial.discard()
            raise TransientError("the rest does not belong to the kept part, starting again")
        partial.total = partial.total if total is None else total
        partial.resumed = True

    def _start(self, client: MirrorClient, response: httpx2.Response) -> None:
        partial = self.partial
        try:
            check_status(response.status_code, response.reason_phrase, response.headers)
            total = content_length(response.headers)
            if self.size is not None and total is not None and total != self.size:
                raise FetchError(f"has {total} bytes, not {self.size}")
        except FetchError:
            if partial.url == client.name:
                partial.discard()
            raise
        body, head = client.blocks(response), b""
        while len(head) < HEAD_BYTES and (block := next(body, b"")):
            head += block
        if not head:
            raise TransientError("an empty response")
        # The kept part is dropped only now that a better one has been checked.
        check_start(head, partial.file, response.headers)
        partial.restart(client.name, validator_of(response.headers), total)
        self._write(head, body)

    def _write(self, head: bytes, body: Iterator[bytes]) -> None:
        partial = self.partial
        shown = partial.length // 1_000_000
        with Progress(-(-(partial.total or 0) // 1_000_000), "MB", start=shown) as progress:
            self._append(head)
            for block in body:
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
            raise TransientError(f"the connection was cut after {partial.progress()}")
        expected = partial.total if self.size is None else self.size
        if expected is not None and count != expected:
            if partial.total is None and count < expected:
                raise TransientError(f"sent {count} bytes, not {expected}")
            partial.discard()
            raise FetchError(f"has {count} bytes, not {expected}")
        self._check_content(url, sha256)
        partial.publish()
        log.info("%s: %d bytes from %s", partial.file, count, url)
        return {"url": url, "bytes": count, "sha256": sha256}

    def _check_content(self, url: str, sha256: str) -> None:
        partial = self.partial
        if self.sha256 is not None and sha256 != self.sha256:
            reason, again = f"sha256 is {sha256}, not {self.sha256}: another file, or a damaged one", partial.resumed
        elif partial.file.suffix == ".gz":
            try:
                check_gzip(partial.path)
                return
            except GzipBombError as error:
                reason, again = str(error), False
            except DamagedGzipError as error:
                if partial.total is None:  # Without a known length, the connection may have been cut.
                    raise TransientError(str(error)) from None
                reason, again = str(error), True
        else:
            return
        partial.discard()
        if not again or url in self.suspected:
            raise FetchError(reason)
        self.suspected.add(url)
        raise _SuspectError(reason)


def keep(file: Path, sha256: str | None = None, size: int | None = None) -> dict[str, Any] | None:
    """Return the facts of a file that is there already and need not be downloaded again; None if it is damaged.

    A file that has changed since it was downloaded counts as damaged, unless its checksum is the expected one.

    Raises:
        UserError: it is a whole file, but not of the size or checksum that the configuration expects.
    """
    if file.is_dir():
        raise UserError(f"{file}: is a folder in the place of a downloaded file; move it away")
    if not file.exists():
        return None
    if file.suffix == ".gz":
        try:
            check_gzip(file)
        except (DamagedGzipError, GzipBombError) as error:
            log.warning("%s: %s; it is downloaded again", file, error)
            return None
    recorded, found = read_record(file).get("sha256"), sha256_of(file)
    if found != sha256 and recorded not in (None, found):
        log.warning("%s: is not the file that was downloaded; it is downloaded again", file)
        return None
    facts = facts_of(file, {"sha256": sha256, "size": size})
    log.info("%s is there already and is used unchanged; delete it to download it again", file)
    return facts


def main() -> None:
    """Spec: urls, path, sha256, size. Runtime: attempts, pause, timeout, slowest, place. Output: file, record."""
    with stage("cm3.datasets.download.stage") as call:
        spec, file = call.spec, call.outputs["file"]
        limits = {
            name: call.runtime[name] for name in ("attempts", "pause", "timeout", "slowest") if name in call.runtime
        }
        sha256, size = spec.get("sha256"), spec.get("size")
        facts = keep(file, sha256, size)
        if facts is None:
            place = Path(call.runtime.get("place", file))
            facts = download(reveal(spec["urls"]), file, sha256, size, place=place, **limits)
        call.record.update(facts, **stamp(file))


if __name__ == "__main__":
    main()
