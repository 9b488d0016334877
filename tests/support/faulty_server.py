"""Faulty servers for the tests of downloads: answers for `oracles_sources.Server`, each bounded in time."""

import contextlib
import http.server
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Handler = http.server.BaseHTTPRequestHandler
Answer = Callable[[Handler], None]

_LONGEST = 120.0


@dataclass
class Mirror:
    """A file on a correct server with Range, If-Range and ETag. The methods are answers with one fault.

    Attributes:
        ranges: the Range header of each request, None where there was none.
        sent: bytes of bodies handed to the network.
    """

    body: bytes
    etag: str | None = '"v1"'
    modified: str | None = None
    honours_range: bool = True
    honours_if_range: bool = True
    says_length: bool = True
    pace: float = 0.0
    ranges: list[str | None] = field(default_factory=list)
    sent: int = 0

    def __call__(self, handler: Handler) -> None:
        self._answer(handler, len(self.body))

    def cut(self, at: int) -> Answer:
        """End the connection with FIN after so many bytes of this answer's body."""
        return lambda handler: self._answer(handler, at)

    def reset(self, at: int) -> Answer:
        """End the connection with RST."""
        return lambda handler: self._answer(handler, at, _reset)

    def stall(self, at: int) -> Answer:
        """Send nothing more, with the connection open."""
        return lambda handler: self._answer(handler, at, lambda *_: time.sleep(_LONGEST))

    def drip(self, at: int) -> Answer:
        """Continue with one byte at a time."""

        def slowly(handler: Handler, rest: bytes) -> None:
            for n in range(min(int(_LONGEST / 0.02), len(rest))):
                handler.wfile.write(rest[n : n + 1])
                time.sleep(0.02)

        return lambda handler: self._answer(handler, at, slowly)

    def misplaced(self, handler: Handler) -> None:
        """Answer a range request with another range; without Range, answer correctly."""
        self._answer(handler, len(self.body), shift=-1)

    def _answer(
        self, handler: Handler, until: int, then: Callable[[Handler, bytes], None] | None = None, shift: int = 0
    ) -> None:
        asked = handler.headers["Range"]
        self.ranges.append(asked)
        found = re.fullmatch(r"bytes=(\d+)-", asked or "")
        condition = handler.headers["If-Range"]
        if condition and self.honours_if_range and condition not in (self.etag, self.modified):
            found = None
        start = int(found[1]) + shift if found and self.honours_range else 0
        total = len(self.body)
        handler.protocol_version = "HTTP/1.1"
        handler.close_connection = True
        if start >= total > 0:
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{total}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        part = found is not None and self.honours_range
        handler.send_response(206 if part else 200)
        if part:
            handler.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if self.etag:
            handler.send_header("ETag", self.etag)
        if self.modified:
            handler.send_header("Last-Modified", self.modified)
        if self.says_length:
            handler.send_header("Content-Length", str(total - start))
        handler.send_header("Connection", "close")
        with contextlib.suppress(OSError):
            handler.end_headers()
            self._send(handler, self.body[start:][:until])
            if then:
                then(handler, self.body[start + until :])

    def _send(self, handler: Handler, body: bytes) -> None:
        step = 1 << 14 if self.pace else max(len(body), 1)
        for first in range(0, len(body), step):
            handler.wfile.write(body[first : first + step])
            self.sent += len(body[first : first + step])
            if self.pace:
                time.sleep(self.pace)


def _reset(handler: Handler, _: bytes) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()
    handler.connection.close()


def moved(location: str) -> Answer:
    """A redirect."""

    def answer(handler: Handler) -> None:
        handler.send_response(302)
        handler.send_header("Location", location)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def raw(*pieces: bytes, pause: float = 0.0) -> Answer:
    """Bytes as they are, status line and all, with a pause after each piece."""

    def answer(handler: Handler) -> None:
        ends = time.monotonic() + _LONGEST
        with contextlib.suppress(OSError):
            for piece in pieces:
                handler.wfile.write(piece)
                if pause and time.monotonic() < ends:
                    time.sleep(pause)
        handler.close_connection = True

    return answer


def dripped_headers() -> Answer:
    """Endless headers, so another byte always arrives."""
    return raw(b"HTTP/1.1 200 OK\r\n", *(b"X-%d: y\r\n" % n for n in range(2400)), pause=0.05)


def dripped_framing() -> Answer:
    """A chunked body whose first chunk has an endless extension name."""
    start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;"
    return raw(start, *(b"x" for _ in range(2400)), pause=0.05)


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    """Yield a URL of a port that refuses connections."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unheard.getsockname()[1]}/a"
