"""Public-address (SSRF) check of resolved names and per-host rate limiting, for aiohttp."""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from cm3.common.http import resolution_error
from cm3.common.ssrf import RefusedError, is_public
from cm3.datasets.images.proxies import environment_proxies

log = logging.getLogger("cm3.datasets.images")

# The rate is halved at most once in _SLOW_DOWN_ONCE_IN seconds, so that one burst of 429 counts once, and doubled again
# after _SPEED_UP_AFTER seconds; _SLOWEST bounds the slowdown.
_SLOW_DOWN_ONCE_IN, _SPEED_UP_AFTER, _SLOWEST = 1.0, 10.0, 64
# A host is down after so many consecutive URLs without an answer, each after all its tries.
_UNANSWERED = 20


class PublicResolver(AbstractResolver):
    """Resolves host names to public addresses only. The check is made when connecting, so DNS rebinding has no effect."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.inner = aiohttp.DefaultResolver()
        self.proxies = {proxy.host for proxy in environment_proxies().values()}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the public addresses of a host.

        Raises:
            RefusedError: it has none.
            UnresolvedError: there is no such name.
        """
        try:
            found = await self.inner.resolve(host, port, family)
        except OSError as error:
            if unresolved := resolution_error(host if host not in self.proxies else f"{host} (the proxy)", error):
                raise unresolved from None
            raise
        if self.private or host in self.proxies:
            return found
        public = [address for address in found if is_public(address["host"])]
        if not public:
            raise RefusedError(f"refused: {host} has a private address")
        return public

    async def close(self) -> None:
        """Close the inner resolver."""
        await self.inner.close()


class Host:
    """Rate limiter of one host: requests per second and at a time, slower after 429, stopped when it is down.

    Attributes:
        slots: semaphore held during a request.
        interval: seconds between two requests.
        down: the reason why no more requests are sent, after a long time without an answer; empty while it is up.
    """

    def __init__(
        self,
        name: str,
        rate: float,
        concurrency: int,
        patience: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Set the limits.

        Args:
            rate: requests per second.
            concurrency: requests at a time.
            patience: seconds without an answer after which a host that did answer before is down.
            clock, sleep: replaced in tests.
        """
        self.name, self.patience = name, patience
        self.slots = asyncio.Semaphore(concurrency)
        self._clock, self._sleep = clock, sleep
        self.down = ""
        self._shortest = self.interval = 1 / rate
        self._free_at = self._slowed_at = self._change_at = float("-inf")
        self._answered = False
        self._unanswered = 0
        self._silent_since = 0.0

    async def turn(self) -> None:
        """Wait until the next request may be sent."""
        now = self._clock()
        while self.interval > self._shortest and now >= self._change_at:
            self.interval = max(self._shortest, self.interval / 2)
            self._change_at += _SPEED_UP_AFTER
        mine = max(now, self._free_at)
        self._free_at = mine + self.interval
        if mine > now:
            await self._sleep(mine - now)

    def hold(self, seconds: float) -> None:
        """Send no request for a number of seconds."""
        self._free_at = max(self._free_at, self._clock() + seconds)

    def slow_down(self) -> None:
        """Halve the rate; it doubles again after each 10 s without another call."""
        now = self._clock()
        if now >= self._slowed_at + _SLOW_DOWN_ONCE_IN:
            self._slowed_at = now
            if self.interval < self._shortest * _SLOWEST:
                self.interval *= 2
                log.warning(
                    "%s answers 429 (too many requests): slowing down to %.3g requests a second",
                    self.name,
                    1 / self.interval,
                )
        self._change_at = now + _SPEED_UP_AFTER

    def answered(self) -> None:
        """Record a response of any status."""
        self._answered, self._unanswered = True, 0

    def unanswered(self, reason: str) -> None:
        """Record one URL without any response in all its tries.

        A host that never answered is down after a few of them. One that did answer before may be down for a while only:
        requests become less and less frequent, and it is down after `patience` seconds.
        """
        now = self._clock()
        self._silent_since = now if not self._unanswered else self._silent_since
        self._unanswered += 1
        if self._unanswered < _UNANSWERED or self.down:
            return
        silent = now - self._silent_since
        if not self._answered or silent >= self.patience:
            self.down = reason
            log.warning("%s does not answer (%s); its other images are not fetched", self.name, reason)
        else:
            self.hold(min(max(silent, 1.0), 30.0))
