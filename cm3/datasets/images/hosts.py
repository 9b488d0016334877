"""Which URLs may be asked, and at what pace: hosts that the config allows, public addresses, one host's turns."""

import asyncio
import ipaddress
import logging
import re
import socket
import urllib.request
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from cm3.datasets.download.client import FetchError

log = logging.getLogger("cm3.datasets.images")

_LONGEST_URL = 8000
# Slowing down: at most once in so many seconds, so that one burst of answers counts once; undone step by step.
_ONCE_IN, _UNDONE_AFTER, _SLOWEST = 1.0, 10.0, 64
# So many URLs in a row without any answer, each after all its tries, and a host is taken to be down.
_UNANSWERED = 20


class RefusedError(FetchError):
    """This URL may not be asked; the config decides."""


def parse_url(text: str) -> URL:
    """Return a URL, quoted as it is sent; what cannot be one is refused.

    Raises:
        RefusedError: not http(s), no valid URL, or one with a user name.
    """
    if len(text) > _LONGEST_URL:
        raise RefusedError(f"refused: the URL has {len(text)} characters")
    try:
        url = URL(text.strip()).with_fragment(None)
        # Of the schemes that yarl knows, http and https have hosts and nothing but hosts to hide.
        if url.scheme not in ("http", "https"):
            raise RefusedError(f"refused: {text[:80]!r} is not http or https")
        if not url.host or url.port == 0:
            raise RefusedError(f"refused: {text[:80]!r} names no host and port")
        if url.user is not None or url.password is not None:
            raise RefusedError("refused: the URL holds a user name or password")
    except ValueError as error:
        raise RefusedError(f"refused: not a valid URL ({error})") from None
    return url


def check_host(url: URL, hosts: list[str], private: bool) -> str:
    """Return the name of a URL's host if it may be asked; ask before the first request and after each redirect.

    Raises:
        RefusedError: it is not in `hosts`, or is a private address and those are not allowed.
    """
    host = (url.host or "").lower()
    if not is_allowed(host, hosts):
        raise RefusedError(f"refused: {host or 'no host'} is not in images.hosts")
    if private:
        return host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # 2130706433, 0x7f.1 and 127.1 are addresses to the system's resolver, and aiohttp asks no other for them.
        if re.fullmatch(r"(0x[0-9a-f]*|\d+)", host.rstrip(".").rpartition(".")[2]):
            raise RefusedError(f"refused: {host} is an address in an unusual form") from None
        return host
    if not is_public(address):
        raise RefusedError(f"refused: {host} is a private address")
    return host


def is_allowed(host: str, hosts: list[str]) -> bool:
    """Return whether `host` is one of `hosts`, or below one that starts with `*.`."""
    return any(host == name or (name[:2] == "*." and host.endswith(name[1:])) for name in map(str.lower, hosts))


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an address is a public one, also one that hides in IPv6: mapped, 6to4 or NAT64."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast


class PublicResolver(AbstractResolver):
    """Looks names up and refuses private addresses, at the moment of connecting, when no name can change any more."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.inner = aiohttp.DefaultResolver()
        self.proxies = {urlsplit(proxy).hostname for proxy in urllib.request.getproxies().values()}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the public addresses of a host.

        Raises:
            RefusedError: it has none.
        """
        found = await self.inner.resolve(host, port, family)
        if self.private or host in self.proxies:
            return found
        public = [address for address in found if is_public(ipaddress.ip_address(address["host"]))]
        if not public:
            raise RefusedError(f"refused: {host} has a private address")
        return public

    async def close(self) -> None:
        """Close the resolver beneath."""
        await self.inner.close()


class Host:
    """One host's turns: so many requests a second, so many at a time, fewer when it asks for patience.

    Attributes:
        places: held during a request.
        down: why it is asked no more, once it has not answered for long; empty while it is asked.
    """

    def __init__(self, name: str, rate: float, concurrency: int, patience: float) -> None:
        """Set the pace: `rate` a second, `concurrency` at a time; down after `patience` seconds of silence."""
        self.name, self.patience = name, patience
        self.places = asyncio.Semaphore(concurrency)
        self.down = ""
        self._shortest = self.interval = 1 / rate
        self._free_at = self._slowed_at = self._change_at = float("-inf")
        self._answered = False
        self._unanswered = 0
        self._silent_since = 0.0

    async def turn(self) -> None:
        """Wait until the host may be asked again."""
        now = _now()
        while self.interval > self._shortest and now >= self._change_at:
            self.interval = max(self._shortest, self.interval / 2)
            self._change_at += _UNDONE_AFTER
        mine = max(now, self._free_at)
        self._free_at = mine + self.interval
        if mine > now:
            await asyncio.sleep(mine - now)

    def hold(self, seconds: float) -> None:
        """Let nobody have a turn for so many seconds."""
        self._free_at = max(self._free_at, _now() + seconds)

    def slow_down(self) -> None:
        """Halve the rate; it doubles again after each 10 s without another call of this."""
        now = _now()
        if now >= self._slowed_at + _ONCE_IN:
            self._slowed_at = now
            if self.interval < self._shortest * _SLOWEST:
                self.interval *= 2
                log.warning("%s says it is asked too often: %.3g requests a second now", self.name, 1 / self.interval)
        self._change_at = now + _UNDONE_AFTER

    def answered(self) -> None:
        """Note that an answer came, whatever it says."""
        self._answered, self._unanswered = True, 0

    def unanswered(self, reason: str) -> None:
        """Note that one URL got no answer in all its tries.

        A host that never answered is down after a few of them. One that did may be out for a while: it is asked less
        and less often, and is down after `patience` seconds.
        """
        now = _now()
        self._silent_since = now if not self._unanswered else self._silent_since
        self._unanswered += 1
        if self._unanswered < _UNANSWERED or self.down:
            return
        silent = now - self._silent_since
        if not self._answered or silent >= self.patience:
            self.down = reason
            log.warning("%s does not answer (%s); its other images are not asked for", self.name, reason)
        else:
            self.hold(min(max(silent, 1.0), 30.0))


def _now() -> float:
    return asyncio.get_running_loop().time()
