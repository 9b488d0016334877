"""HTTP client of the file download: httpx2 with address checks when connecting, checked redirects and read deadlines."""

import contextlib
import logging
import netrc
import os
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpcore2
import httpx2
from yarl import URL

from cm3.common.errors import UserError
from cm3.common.http import (
    USER_AGENT,
    FetchError,
    TransientError,
    hide_secrets,
    one_line,
    resolution_error,
    without_secrets,
)
from cm3.common.ssrf import RefusedError, check_host, is_public, parse_url

# It logs the URL of every request, secrets included.
logging.getLogger("httpx2").setLevel(logging.WARNING)

_REDIRECTS = 10
_MOVED = (301, 302, 303, 307, 308)


class MirrorClient:
    """Requests to one configured mirror and the public hosts it redirects to. A context manager.

    Private addresses are allowed for the configured host only, and no longer once its name has led to public ones.
    Every mirror needs a client of its own, so that addresses, cookies and connections are not shared.

    Attributes:
        url: of the file, with the secrets that it may hold.
        name: the URL without them, for messages and records.
    """

    def __init__(self, url: str, timeout: float, slowest: float = 0.0) -> None:
        """Prepare requests for `url`.

        Args:
            timeout: seconds for connecting and response headers together, and between two blocks of a body.
            slowest: bytes per second of a body; fewer over `timeout` seconds are an error.
        """
        self.url, self.name, self.timeout, self.slowest = url, without_secrets(url), timeout, slowest
        self.addresses = AddressCheck(httpx2.URL(url).raw_host.decode())
        self._network = _Network(self.addresses)
        self._client = httpx2.Client(
            transport=_Transport(self._network),
            auth=None if httpx2.URL(url).userinfo else _netrc_auth(),
            headers={"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity"},
        )

    def __enter__(self) -> "MirrorClient":
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    @contextlib.contextmanager
    def get(self, headers: Mapping[str, str], method: str = "GET") -> Iterator[httpx2.Response]:
        """Yield the first response that is not a redirect, its body unread.

        Args:
            headers: sent with every request.
            method: GET, or HEAD for the headers alone.

        Raises:
            FetchError: over 10 redirects, one to something other than a public http(s) address, or no HTTP response.
            TransientError: no connection, or no response headers in time.
        """
        here = self.url
        for _ in range(_REDIRECTS + 1):
            with contextlib.ExitStack() as response_context:
                with self._errors("no proper HTTP answer: "):
                    self._network.restart_clock(self.timeout)
                    response = response_context.enter_context(self._client.stream(method, here, headers=headers))
                if response.status_code not in _MOVED or "Location" not in response.headers:
                    yield response
                    return
                here = self._target(response)
        raise FetchError(f"more than {_REDIRECTS} redirects, the last one to {without_secrets(here)[:200]}")

    def _target(self, response: httpx2.Response) -> str:
        location = response.headers["Location"]
        try:
            target = parse_url(str(URL(str(response.url.copy_with(userinfo=b""))).join(URL(location))))
            check_host(target, [target.host or ""], private=self.addresses.is_trusted(target.raw_host or ""))
        except (FetchError, ValueError) as error:
            shown = hide_secrets(without_secrets(location)[:200])
            raise FetchError(f"redirects to {shown!r}: {hide_secrets(str(error), location)}") from None
        return str(target)

    def blocks(self, response: httpx2.Response) -> Iterator[bytes]:
        """Yield the body as it arrives, undecoded, including the last bytes before a connection is cut.

        Raises:
            TransientError: the connection was cut, no byte for `timeout` seconds, or fewer bytes per second than
                `slowest` over that time.
            FetchError: more bytes than Content-Length.
        """
        since, count, block = time.monotonic(), 0, b""
        body = response.iter_raw()
        while True:
            with self._errors():
                # The deadline is for bytes of the body, which the framing of chunks is not.
                self._network.restart_clock(self.timeout)
                following = next(body, None)
            if following is None:
                break
            block = following
            yield block
            count += len(block)
            if (elapsed := time.monotonic() - since) >= self.timeout:
                if count < self.slowest * elapsed:
                    raise TransientError(f"too slow: {count} bytes in {elapsed:.0f} s")
                since, count = time.monotonic(), 0
        if "Content-Length" in response.headers and not self._network.received.endswith(block):
            raise FetchError("no proper HTTP answer: more bytes than its Content-Length")

    @contextlib.contextmanager
    def _errors(self, improper: str = "") -> Iterator[None]:
        """Translate the library's exceptions; protocol errors of response headers are permanent, of a body a cut."""
        try:
            yield
        except httpcore2.TimeoutException:
            raise TransientError("no answer in time") from None
        except httpcore2.ProtocolError as error:
            if improper and self._network.received:
                raise FetchError(improper + one_line(str(error), 300)) from None
            if improper:
                raise TransientError("the server disconnected without an answer") from None
            raise TransientError(f"the connection was cut ({one_line(str(error), 300)})") from None
        except (httpcore2.NetworkError, httpcore2.ProxyError) as error:
            reason = one_line(str(error), 300) or type(error).__name__
            raise TransientError(reason if improper else f"the connection was cut ({reason})") from None


def _netrc_auth() -> httpx2.NetRCAuth | None:
    """Return the passwords in the file that NETRC names, or in ~/.netrc; None if there is no such file."""
    path = Path(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))  # noqa: PTH111 (does not raise without a home)
    try:
        return httpx2.NetRCAuth(str(path)) if path.is_file() else None
    except (OSError, netrc.NetrcParseError) as error:
        reason = error.msg if isinstance(error, netrc.NetrcParseError) else error.strerror
        raise UserError(f"{path}: cannot be read ({reason}); correct the file, or set NETRC to another one") from None


class AddressCheck:
    """Resolves host names, to private addresses only for the host of a configured mirror."""

    def __init__(self, mirror: str, resolve: Callable[..., list[Any]] = socket.getaddrinfo) -> None:
        """Take the host of the mirror; `resolve` is replaced in tests."""
        self._trusted: str | None = mirror.lower()
        self._resolve = resolve
        self._proxies = frozenset(proxy.url.raw_host.decode() for proxy in _proxies().values())

    def is_trusted(self, host: str) -> bool:
        """Return whether private addresses of this host are allowed."""
        return host.lower() == self._trusted

    def addresses(self, host: str, port: int) -> list[str]:
        """Return the addresses of a host that a connection may be opened to.

        Raises:
            RefusedError: it has none.
            UnresolvedError: there is no such name.
            httpcore2.ConnectError: the name cannot be resolved at the moment.
        """
        try:
            found = list(dict.fromkeys(info[4][0] for info in self._resolve(host, port, type=socket.SOCK_STREAM)))
        except OSError as error:
            unresolved = resolution_error(host if host not in self._proxies else f"{host} (the proxy)", error)
            raise unresolved or httpcore2.ConnectError(f"Cannot resolve {host}: {error}") from None
        if host in self._proxies:
            return found
        public = [address for address in found if is_public(address)]
        if self.is_trusted(host):
            if len(public) == len(found):
                self._trusted = None
            return found
        if not public:
            raise RefusedError(f"refused: {host} has a private address")
        return public


class _Network(httpcore2.NetworkBackend):
    """Opens connections to checked addresses, whose reads share one deadline.

    A timeout per read alone would let a server that sends single bytes keep a client waiting for ever.
    """

    def __init__(self, addresses: AddressCheck) -> None:
        self._addresses = addresses
        self._sockets = httpcore2.SyncBackend()
        self._deadline = 0.0
        self.received = b""  # by the last read; empty after the end of a connection

    def restart_clock(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    def left(self) -> float:
        if (seconds := self._deadline - time.monotonic()) <= 0:
            raise httpcore2.ReadTimeout("deadline")
        return seconds

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        failure: Exception = httpcore2.ConnectError(f"{host} has no address")
        self.received = b""
        for address in self._addresses.addresses(host, port):
            try:
                return _Stream(self._sockets.connect_tcp(address, port, self.left(), None, socket_options), self)
            except httpcore2.ConnectError as error:
                failure = error
        raise failure


class _Stream(httpcore2.NetworkStream):
    def __init__(self, inner: httpcore2.NetworkStream, network: _Network) -> None:
        self._inner, self._network = inner, network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._network.received = self._inner.read(max_bytes, self._network.left())
        return self._network.received

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._network.left())

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, self._network.left()), self._network)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Transport(httpx2.BaseTransport):
    """Sends requests through `_Network`, and through the proxies that the environment names."""

    def __init__(self, network: _Network) -> None:
        self._network = network
        self._ssl = ssl.create_default_context()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        pool = self._pool(url.scheme, url.raw_host.decode())
        target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        try:
            response = pool.handle_request(httpcore2.Request(request.method, target, headers=request.headers.raw))
        except BaseException:
            pool.close()
            raise
        body = _Body(response.stream, pool)
        return httpx2.Response(response.status, headers=response.headers, stream=body, extensions=response.extensions)

    def _pool(self, scheme: str, host: str) -> httpcore2.ConnectionPool:
        proxy = _proxies().get(scheme)
        if proxy is None or urllib.request.proxy_bypass(host):
            return httpcore2.ConnectionPool(ssl_context=self._ssl, network_backend=self._network)
        if proxy.url.scheme not in ("http", "https"):
            raise FetchError(f"only http proxies are supported, not {proxy.url.scheme}")
        return httpcore2.HTTPProxy(
            httpcore2.URL(scheme=proxy.url.raw_scheme, host=proxy.url.raw_host, port=proxy.url.port, target=b"/"),
            proxy_auth=proxy.raw_auth,
            ssl_context=self._ssl,
            network_backend=self._network,
        )


def _proxies() -> dict[str, httpx2.Proxy]:
    """Return the proxies that http_proxy and https_proxy name, by the scheme that they are for.

    Raises:
        UserError: one is not a URL.
    """
    found = {scheme: url for scheme, url in urllib.request.getproxies().items() if scheme in ("http", "https") and url}
    proxies = {}
    for scheme, url in found.items():
        try:
            proxies[scheme] = httpx2.Proxy(url if "://" in url else f"http://{url}")
        except (httpx2.InvalidURL, ValueError):
            raise UserError(
                f"the environment variable {scheme}_proxy is not the address of a proxy, such as http://host:3128; correct it"
            ) from None
    return proxies


class _Body(httpx2.SyncByteStream):
    def __init__(self, stream: Any, pool: httpcore2.ConnectionPool) -> None:
        self._stream, self._pool = stream, pool

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        self._stream.close()
        self._pool.close()
