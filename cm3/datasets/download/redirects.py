"""Following a mirror's redirects: few, to http(s) only, and to no private address but the mirror's own."""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Mapping

import aiohttp
from aiohttp.abc import ResolveResult
from yarl import URL

from cm3.datasets.download.client import FetchError
from cm3.datasets.images.hosts import PublicResolver, check_host, is_public, parse_url

_MOVED = (301, 302, 303, 307, 308)
_MOST = 10


class MirrorResolver(PublicResolver):
    """Looks names up; private addresses are for the host of one configured mirror only.

    A mirror whose name has led to public addresses is not trusted with private ones afterwards.
    """

    def __init__(self, url: str) -> None:
        """Take the mirror as configured."""
        super().__init__(private=False)
        self.trusted = {(URL(url).host or "").lower()}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of a host that may be connected to.

        Raises:
            RefusedError: it has none.
        """
        if host not in self.trusted:
            return await super().resolve(host, port, family)
        found = await self.inner.resolve(host, port, family)
        if host not in self.proxies and all(is_public(ipaddress.ip_address(address["host"])) for address in found):
            self.trusted.discard(host)
        return found


@contextlib.asynccontextmanager
async def following(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], resolver: MirrorResolver, timeout: float
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Ask for `url` and yield the first answer that is no redirect, its body unread.

    Args:
        headers: sent with every request.
        resolver: the session's own, which knows the mirror.
        timeout: seconds until an answer's headers are complete, of each hop.

    Raises:
        FetchError: more than 10 redirects, or one to something other than a public http(s) address.
        TimeoutError, aiohttp.ClientError: no answer.
    """
    here: str | URL = url
    for _ in range(_MOST + 1):
        # Of the headers as a whole: a server that drips them never lets sock_read run out.
        async with asyncio.timeout(timeout):
            response = await session.get(here, headers=headers, allow_redirects=False)
        async with response:
            if response.status not in _MOVED or "Location" not in response.headers:
                yield response
                return
            here = _target(response, resolver)
    raise FetchError(f"more than {_MOST} redirects, the last one to {str(here)[:200]}")


def _target(response: aiohttp.ClientResponse, resolver: MirrorResolver) -> URL:
    location = response.headers["Location"]
    try:
        target = parse_url(str(response.url.join(URL(location))))
        check_host(target, [target.host or ""], private=(target.host or "").lower() in resolver.trusted)
    except (FetchError, ValueError) as error:
        raise FetchError(f"redirects to {location[:200]!r}: {error}") from None
    return target
