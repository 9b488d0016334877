"""A client of an OpenAI-compatible server that waits, tries again, and gives up for a reason that it tells."""

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from cm3.common.errors import UserError
from extractors.caption.openai_replies import BadError, RefusedError, Replies, Reply, WaitError

log = logging.getLogger(__name__)

PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds before the second try, doubled each time, and the most."""
FAILED_IN_A_ROW = 20
"""Failed requests without a good answer between them that cast doubt on the server; at the beginning they end the job."""
_HOLDS, _WAITS = 8, 30  # a request that is told to wait holds up the others at first, and may fail in the end
_LONGEST_BODY = 1 << 20
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass
class ChatServer:
    """A server at `url`, shared by all requests of a job: one that is told to wait makes all of them wait.

    Attributes:
        url: the base, such as http://127.0.0.1:8000/v1.
        key_env: name of the environment variable that may hold the key. The key is in no message.
        timeout: seconds for one answer.
        attempts: bad answers to one request until it is given up, if the server still answers others.
        patience: seconds without any good answer after which the job ends.
    """

    url: str
    key_env: str
    concurrency: int
    timeout: float
    attempts: int
    patience: float
    _known: Mapping[str, Any] | None = field(default=None, init=False, repr=False)
    _failed: int = field(default=0, init=False)
    _held_until: float = field(default=0.0, init=False)
    _good_at: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        key = os.environ.get(self.key_env, "").strip()
        if not all("!" <= letter <= "~" for letter in key):
            raise UserError(
                f"the environment variable {self.key_env} holds no API key: blanks or odd letters are in it"
            )
        self._replies = Replies(self.url, self.key_env, key)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        parts = urlsplit(self.url)
        local = parts.hostname in _LOCAL
        if os.environ.get("CM3_OFFLINE", "") not in ("", "0") and not local:
            raise UserError(f"CM3_OFFLINE is set, so {self.url} is not asked; only a server on this machine would be")
        # Not by aiohttp's trust_env: it would take a password from ~/.netrc in place of the key.
        direct = local or proxy_bypass(parts.hostname or "")
        self._proxy = None if direct else getproxies().get(parts.scheme)

    @property
    def answered(self) -> bool:
        """Whether the server gave one good answer so far."""
        return self._known is not None

    def session(self) -> aiohttp.ClientSession:
        """Return connections to the server, to be used in one event loop. Its clock of silence starts anew."""
        self._good_at = time.monotonic()
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self.concurrency),
            timeout=aiohttp.ClientTimeout(total=self.timeout),
            headers=self._headers,
        )

    async def models(self) -> dict[str, str]:
        """Return the names that the server says that it serves, each with what is behind it ("" where it doesn't tell).

        Raises:
            UserError: nobody answers at the address, or the key is refused.
        """
        async with self.session() as session:
            for attempt in range(1, self.attempts + 1):
                try:
                    status, _, body = await self._fetch(session, "GET", "/models")
                    break
                except (BadError, WaitError) as fault:
                    if attempt == self.attempts:
                        raise UserError(
                            f"{self.url}: no captioning server answers there ({fault}); start it, or correct url"
                        ) from None
                    await asyncio.sleep(_pause(attempt))
        if status == 401:
            raise self._replies.no_key(body)
        try:
            listed, line = json.loads(body)["data"] if status == 200 else [], self._replies.line
            return {line(str(one["id"])): line(str(one.get("root") or "")) for one in listed}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}

    async def ask(self, session: aiohttp.ClientSession, request: Mapping[str, Any]) -> Reply:
        """Return the completion of a request for one.

        Raises:
            RefusedError: the server will not or cannot answer this one, though it answers others.
            UserError: it is no use to go on: wrong address or key, or the server is out of order.
        """
        bad = waits = refused = 0
        cleared = False  # whether the server was found in order after this request's last failure but one
        while True:
            await self._until_allowed()
            try:
                reply = await self._once(session, request)
            except WaitError as told:
                if told.wait > self.patience:
                    raise self._replies.stop(f"{told}, and wants to be left alone for {told.wait:.0f} s") from None
                waits += 1
                pause, spent, reason = max(told.wait, _pause(waits)), waits > _WAITS, f"{told}, {waits} times"
                if waits <= _HOLDS:
                    self._hold(reason, pause)
            except BadError as fault:
                bad += 1
                pause, spent, reason = _pause(bad), bad >= self.attempts, f"{fault}, {bad} times"
            except RefusedError as refusal:
                refused += 1
                pause, spent, reason = _pause(refused), True, str(refusal)
                if self._known is not None and self._failed < FAILED_IN_A_ROW:
                    self._failed += 1
                    raise
            else:
                self._known = request
                return reply
            if spent:
                if cleared:
                    raise RefusedError(reason)
                cleared = await self._in_order(session, reason)
                if cleared:  # perhaps only since a moment ago: the request gets its last chance
                    continue
            if self._silence() > max(self.patience, 2 * self.timeout) and not await self._still_answers(session):
                raise self._replies.stop(f"no good answer for {self._silence():.0f} s, the last was: {reason}")
            await asyncio.sleep(pause)

    async def prove(self, session: aiohttp.ClientSession, request: Mapping[str, Any], failed: int) -> None:
        """Find out by a harmless request whether a server that answered nothing so far is in order.

        Raises:
            UserError: it is not.
        """
        try:
            await self.ask(session, request)
        except RefusedError as reason:
            raise self._replies.stop(
                f"{failed} requests got no caption, and neither did one for a plain white image: {reason}"
            ) from None

    async def _once(self, session: aiohttp.ClientSession, request: Mapping[str, Any]) -> Reply:
        reply = self._replies.reply(*await self._fetch(session, "POST", "/chat/completions", request))
        self._failed, self._good_at = 0, time.monotonic()
        return reply

    async def _in_order(self, session: aiohttp.ClientSession, reason: str) -> bool:
        """Return whether the server answers what it answered before, so that a fault is the failed request's own.

        Raises:
            RefusedError: it answered nothing so far, so that there is nothing to ask.
            UserError: and it had many chances.
        """
        if self._known is not None:
            return await self._still_answers(session)
        self._failed += 1
        if self._failed >= FAILED_IN_A_ROW:
            raise self._replies.stop(f"the first {self._failed} requests got no caption, the last one: {reason}")
        raise RefusedError(reason, early=True)

    async def _still_answers(self, session: aiohttp.ClientSession) -> bool:
        try:
            return self._known is not None and bool(await self._once(session, self._known))
        except (BadError, WaitError, RefusedError):
            return False

    async def _until_allowed(self) -> None:
        while (left := self._held_until - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def _hold(self, reason: str, seconds: float) -> None:
        # All requests, because a server that is full or away is so for each of them. A request that is told to wait for
        # ever is at fault itself, and holds up nobody after some time.
        now = time.monotonic()
        if self._held_until <= now:
            log.warning("%s: %s; all requests wait for %.1f s", self.url, reason, seconds)
        self._held_until = max(self._held_until, now + seconds)

    def _silence(self) -> float:
        return time.monotonic() - self._good_at

    async def _fetch(
        self, session: aiohttp.ClientSession, method: str, path: str, request: Mapping[str, Any] | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        try:
            # A redirect is not followed: it would send images to a host that nobody named.
            async with session.request(
                method, self.url + path, json=request, allow_redirects=False, proxy=self._proxy
            ) as response:
                body = b""
                async for part in response.content.iter_chunked(1 << 16):
                    body += part
                    if len(body) > _LONGEST_BODY:
                        raise BadError(f"an answer of over {_LONGEST_BODY} bytes")
                return response.status, response.headers, body
        except TimeoutError:
            raise BadError(f"no answer in {self.timeout:g} s") from None
        except aiohttp.ClientConnectorError as error:
            told = self._replies.line(str(error))
            if isinstance(error, aiohttp.ClientSSLError):
                raise UserError(f"{self.url}: no safe connection ({told})") from None
            raise WaitError(told) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise BadError(self._replies.line(f"{type(error).__name__}: {error}")) from None


def _pause(failures: int) -> float:
    # Jitter, so that requests that failed together don't come back together.
    return float(min(PAUSE * 2 ** min(failures - 1, 20), LONGEST_PAUSE) * random.uniform(1, 1.5))
