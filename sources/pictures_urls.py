"""Finder of pictures on the web: politely, and from allowed hosts only."""

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from sources.finding import Found, Wanted
from sources.picture import UnreadableError, examine
from sources.web import USER_AGENT, BusyError, FetchError, check_status, offline, reason, trying
from stages.errors import UserError
from stages.files import atomic
from stages.progress import Progress
from stages.tables import FAILED, MISSING

log = logging.getLogger("sources.pictures")

_REDIRECTS = 5
_RUNTIME = {"rate": 50.0, "concurrency": 16, "timeout": 30.0, "attempts": 5, "pause": 1.0}


def find(
    wanted: Sequence[Wanted], spec: dict[str, Any], runtime: dict[str, Any], inputs: dict[str, Path], downloads: Path
) -> Iterator[Found]:
    """Fetch each item's picture from the first of its URLs that gives one that decodes.

    What was fetched stays in `downloads`, so that a stage that was stopped goes on where it was.

    Raises:
        UserError: CM3_OFFLINE is set and a picture is not there yet, or not one picture could be fetched.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    absent = sum(
        1 for item in wanted if item.references and not any(_kept(downloads, u).exists() for u in item.references)
    )
    if absent and offline():
        raise UserError(
            f"CM3_OFFLINE is set, and the pictures of {absent} items are not here: get them on another machine "
            "and set images.folder and images.pattern"
        )
    found = asyncio.run(_Fetcher(spec, {**_RUNTIME, **runtime}, downloads).fetch_all(wanted))
    tried = [place for place in found if place.status != MISSING]
    if tried and all(place.status == FAILED for place in tried):
        raise UserError(f"none of {len(tried)} pictures could be fetched; the first: {tried[0].url}: {tried[0].error}")
    yield from found


def _kept(downloads: Path, url: str) -> Path:
    return downloads / hashlib.sha256(url.encode()).hexdigest()


class _Host:
    """The pace at which one host is asked."""

    def __init__(self, rate: float, concurrency: int) -> None:
        self.interval = 1 / rate
        self.places = asyncio.Semaphore(concurrency)
        self.free_at = 0.0

    async def turn(self) -> None:
        now = asyncio.get_running_loop().time()
        mine = max(now, self.free_at)
        self.free_at = mine + self.interval
        await asyncio.sleep(mine - now)

    def hold(self, seconds: float) -> None:
        self.free_at = max(self.free_at, asyncio.get_running_loop().time() + seconds)


class _Fetcher:
    def __init__(self, spec: dict[str, Any], runtime: dict[str, Any], downloads: Path) -> None:
        self.spec, self.runtime, self.downloads = spec, runtime, downloads
        self.hosts: dict[str, _Host] = {}

    async def fetch_all(self, wanted: Sequence[Wanted]) -> list[Found]:
        found: list[Found | None] = [None] * len(wanted)
        queue = iter(enumerate(wanted))
        timeout = self.runtime["timeout"]
        connector = aiohttp.TCPConnector(limit=0, resolver=_Resolver(self.spec["private"]))
        with Progress(len(wanted), "downloads") as progress:
            async with aiohttp.ClientSession(
                connector=connector, trust_env=True, headers={"User-Agent": USER_AGENT},
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
            ) as session:  # fmt: skip

                async def work() -> None:
                    for number, item in queue:
                        place = found[number] = await self._first(session, item)
                        progress.advance(1, **{place.status: 1})

                # More workers than one host's places, so that a slow host does not hold up the others.
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(4 * self.runtime["concurrency"], len(wanted))):
                        group.create_task(work())
        return [place for place in found if place is not None]

    async def _first(self, session: aiohttp.ClientSession, item: Wanted) -> Found:
        complaints = []
        for url in item.references:
            try:
                path = await self._fetch(session, url)
                await asyncio.to_thread(_examine_file, path, self.spec["max_pixels"])
                return Found(path, url)
            except (FetchError, BusyError, UnreadableError, aiohttp.ClientError, TimeoutError, ValueError) as error:
                complaints.append(reason(error))
        if not complaints:
            return Found(None, "", MISSING, "the item names no picture")
        return Found(None, item.references[0], FAILED, "; ".join(complaints))

    async def _fetch(self, session: aiohttp.ClientSession, url: str) -> Path:
        path = _kept(self.downloads, url)
        if path.exists():
            return path
        async for attempt in trying(
            self.runtime["attempts"], self.runtime["pause"], lambda why: log.debug("%s: %s", url, why)
        ):
            with attempt:
                data = await self._follow(session, url)
        with atomic(path) as temporary:
            temporary.write_bytes(data)
        return path

    async def _follow(self, session: aiohttp.ClientSession, url: str) -> bytes:
        for _ in range(_REDIRECTS + 1):
            name = self._check(url)
            host = self.hosts.setdefault(name, _Host(self.runtime["rate"], self.runtime["concurrency"]))
            async with host.places:
                await host.turn()
                async with session.get(url, allow_redirects=False) as response:
                    if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                        url = urljoin(url, response.headers["Location"])
                        continue
                    try:
                        check_status(response)
                    except BusyError as busy:
                        host.hold(busy.wait)
                        raise
                    return await self._body(response)
        raise FetchError(f"more than {_REDIRECTS} redirects")

    def _check(self, url: str) -> str:
        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
        if parts.scheme not in ("http", "https"):
            raise FetchError(f"refused: {url[:80]!r} is not http or https")
        if not any(
            host == allowed or (allowed[:2] == "*." and host.endswith(allowed[1:])) for allowed in self.spec["hosts"]
        ):
            raise FetchError(f"refused: {host or 'no host'} is not in images.hosts")
        with contextlib.suppress(ValueError):
            if not ipaddress.ip_address(host).is_global and not self.spec["private"]:
                raise FetchError(f"refused: {host} is a private address")
        return host

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        most = self.spec["max_bytes"]
        data = bytearray()
        async for chunk in response.content.iter_chunked(1 << 16):
            data += chunk
            if len(data) > most:
                raise FetchError(f"more than the {most} bytes allowed")
        return bytes(data)


def _examine_file(path: Path, max_pixels: int) -> None:
    examine(path.read_bytes(), max_pixels)


class _Resolver(AbstractResolver):
    """Looks names up and refuses private addresses, at the moment of connecting, when no name can change any more."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.inner = aiohttp.DefaultResolver()
        self.proxies = {urlsplit(proxy).hostname for proxy in urllib.request.getproxies().values()}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self.inner.resolve(host, port, family)
        if self.private or host in self.proxies:
            return found
        public = [address for address in found if ipaddress.ip_address(address["host"]).is_global]
        if not public:
            raise FetchError(f"refused: {host} has a private address")
        return public

    async def close(self) -> None:
        await self.inner.close()
