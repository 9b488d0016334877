"""Asynchronous image download: each URL once, many at a time, rate-limited per host, decoded in threads."""

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import aiohttp
import tenacity
from yarl import URL

from cm3.common.errors import UserError, machine_fault
from cm3.common.http import (
    USER_AGENT,
    FetchError,
    TransientError,
    UnresolvedError,
    back_off,
    check_status,
    hide_secrets,
    one_line,
)
from cm3.common.image_decode import UnreadableError
from cm3.common.progress import Progress
from cm3.common.ssrf import RefusedError, check_host, parse_url
from cm3.common.tables import FAILED, MISSING, OK
from cm3.datasets.images.alternatives import absent_statuses
from cm3.datasets.images.encodings import EncodingError, decoded
from cm3.datasets.images.hosts import Host, PublicResolver
from cm3.datasets.images.proxies import environment_proxies, proxy_of
from cm3.datasets.images.source import Wanted
from cm3.datasets.images.store import Outcome, Store
from cm3.datasets.images.validate import PlaceholderError, examine

log = logging.getLogger("cm3.datasets.images")
T = TypeVar("T")

_SILENCE = frozenset({"no connection", "no answer in time"})
NOT_REACHED = _SILENCE | {"refused"}
"""Kinds of failure before the server said anything about the image."""

_REDIRECTS = 5
# Multiples of the requests at a time to one host: requests to all hosts together, and items in progress, including
# those that wait for their next try.
_CONNECTIONS, _ITEMS = 4, 16
# Longest duration of a request as a multiple of the timeout, for servers that send single bytes.
LONGEST = 10
# Bodies over _LARGE bytes that may be in memory at a time.
_LARGE, _LARGE_AT_A_TIME = 1_000_000, 4
_TRANSIENT = (
    TransientError,
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    ConnectionError,
    TimeoutError,
)
_NO_IMAGE = re.compile(r"(?<![a-z])no[-_]?(img|image)", re.IGNORECASE)


class _NoImageError(FetchError):
    """The response holds no image, for a reason of this kind."""

    def __init__(self, kind: str, reason: str, status: str = FAILED) -> None:
        super().__init__(reason)
        self.kind, self.status = kind, status


class _RetryError(TransientError):
    """A status that asks to try again, with its kind."""

    def __init__(self, kind: str, reason: str, wait: float) -> None:
        super().__init__(reason, wait)
        self.kind = kind


class Fetcher:
    """Downloads URLs and adds the outcome of each to a store. For one event loop.

    Attributes:
        requested: number of URLs that a request was sent for.
    """

    def __init__(self, spec: dict[str, Any], runtime: dict[str, Any], store: Store) -> None:
        """Take spec and runtime of the images stage; no request is sent for URLs whose outcome is in `store`."""
        self.spec, self.runtime, self.store = spec, runtime, store
        self.requested = 0
        self._hosts: dict[str, Host] = {}
        self._silence: dict[str, Outcome] = {}
        self._pending: dict[str, asyncio.Event] = {}

    async def fetch(self, wanted: Sequence[Wanted]) -> None:
        """Try each item's URLs in order until one is ok.

        Raises:
            UserError: the disk is full, or the proxy of the environment is invalid, silent or refuses.
        """
        queue = iter(wanted)
        self._proxies = environment_proxies()
        timeout, concurrency = self.runtime["timeout"], self.runtime["concurrency"]
        self._slots = asyncio.Semaphore(_CONNECTIONS * concurrency)
        self._large = asyncio.Semaphore(_LARGE_AT_A_TIME)
        with Progress(len(wanted), "downloads") as progress, ThreadPoolExecutor(self.runtime["threads"]) as self._pool:
            async with aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, resolver=PublicResolver(self.spec["private"])),
                trust_env=True,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": USER_AGENT, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
                timeout=aiohttp.ClientTimeout(
                    total=LONGEST * timeout, connect=timeout, sock_connect=timeout, sock_read=timeout
                ),
            ) as self._session:

                async def work() -> None:
                    for item in queue:
                        progress.advance(1, **{await self._item(item): 1})

                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(_ITEMS * concurrency, len(wanted))):
                            group.create_task(work())
                except BaseExceptionGroup as several:
                    # Of many tasks that met the same full disk, one message is enough.
                    if (user_errors := several.subgroup(UserError)) is not None:
                        raise user_errors.exceptions[0] from None
                    raise

    async def _item(self, item: Wanted) -> str:
        worst = MISSING
        for url in item.references:
            status = (await self._outcome(url)).status
            if status == OK:
                return OK
            worst = FAILED if status == FAILED else worst
        return worst

    async def _outcome(self, url: str) -> Outcome:
        while url in self._pending:  # Another item has the same URL.
            await self._pending[url].wait()
        known = without_request(url, self.spec) or self.store.outcomes.get(url)
        if known is not None:
            return known
        self._pending[url] = asyncio.Event()
        try:
            return await self._ask(url)
        finally:
            self._pending.pop(url).set()

    async def _ask(self, url: str) -> Outcome:
        host = self._host(check_host(parse_url(url), self.spec["hosts"], self.spec["private"]))
        if host.down:
            outcome = self._silence[host.name]
        else:
            self.requested += 1
            try:
                return await self._tries(url)
            except BaseException as error:
                if fault := self._fault(error, f"a download from {host.name}"):
                    raise fault from error
                if (explained := _explain(error)) is None:
                    raise
                outcome = explained
            if outcome.kind in _SILENCE:
                self._silence[host.name] = outcome
                host.unanswered(outcome.reason)
        await self._in_thread(self.store.add, url, outcome)
        return outcome

    def _fault(self, error: BaseException, what: str) -> UserError | None:
        """Return the error to raise if the machine or its proxy is at fault, which says nothing about the image."""
        if fault := machine_fault(error, what):
            return fault
        if not isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError)):
            return None
        if isinstance(error, aiohttp.ClientHttpProxyError):
            return _proxy_error(error.status, error.message) if error.status == 407 else None
        if error.host in {proxy.host for proxy in self._proxies.values()}:
            return UserError(
                f"the proxy {error.host}:{error.port} of the environment cannot be reached ({one_line(str(error))}); set "
                "http_proxy, https_proxy or all_proxy to http://host:port, or no_proxy for hosts to ask directly"
            )
        try:  # a resolver that can open no file says that the host is unknown
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as files:
            return machine_fault(files, what)
        return None

    async def _tries(self, url: str) -> Outcome:
        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return back_off(state.attempt_number, self.runtime["pause"], error)

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.runtime["attempts"]),
            wait=wait,
            retry=tenacity.retry_if_exception_type(_TRANSIENT),
            before_sleep=tenacity.before_sleep_log(log, logging.DEBUG),
            reraise=True,
        )
        return await retrying(self._follow, url)

    async def _follow(self, first: str) -> Outcome:
        url, seen = parse_url(first), []
        for _ in range(_REDIRECTS + 1):
            host = self._host(check_host(url, self.spec["hosts"], self.spec["private"]))
            async with host.slots:
                await host.turn()
                proxy = proxy_of(url, self._proxies)
                async with self._slots, self._session.get(url, allow_redirects=False, proxy=proxy) as response:
                    if proxy is not None and response.status == 407:
                        raise _proxy_error(response.status, response.reason or "")
                    host.answered()
                    if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                        url = parse_url(str(url.join(URL(response.headers["Location"]))))
                        if is_no_image(url):
                            raise _NoImageError("placeholder", f"led on to a placeholder: {url.name}", MISSING)
                        seen.append(check_host(url, self.spec["hosts"], self.spec["private"]))
                        continue
                    _check(response, host, absent_statuses(self.spec, host.name))
                    async with contextlib.AsyncExitStack() as large:
                        data = await self._body(response, large)
                        if encoding := ",".join(response.headers.getall("Content-Encoding", [])):
                            data = await self._in_thread(_without_encoding, data, encoding, self.spec["max_bytes"])
                        # The slot is kept meanwhile: when decoding is slower than the network, the network waits.
                        return await self._in_thread(self._examine, first, data, tuple(dict.fromkeys(seen)))
        raise _NoImageError("redirects", f"more than {_REDIRECTS} redirects")

    async def _body(self, response: aiohttp.ClientResponse, large: contextlib.AsyncExitStack) -> bytes:
        most = self.spec["max_bytes"]
        if (response.content_length or 0) > most:
            raise _NoImageError("too many bytes", f"more than the {most} bytes allowed")
        chunks, size = [], 0
        async for chunk in response.content.iter_any():
            chunks.append(chunk)
            size += len(chunk)
            if size > most:
                raise _NoImageError("too many bytes", f"more than the {most} bytes allowed")
            if size - len(chunk) <= _LARGE < size:
                await large.enter_async_context(self._large)
        return b"".join(chunks)

    def _examine(self, url: str, data: bytes, hosts: tuple[str, ...]) -> Outcome:
        try:
            image = examine(data, self.spec["max_pixels"], self.spec["placeholders"])
            outcome = Outcome.of(image, OK, hosts=hosts)
        except PlaceholderError as error:
            outcome = Outcome.of(error.image, MISSING, error.kind, str(error), hosts)
        except UnreadableError as error:
            outcome = Outcome(FAILED, error.kind, one_line(str(error)), hosts=hosts)
        self.store.add(url, outcome, data)
        return outcome

    def _host(self, name: str) -> Host:
        if name not in self._hosts:
            pace = self.runtime["rate"], self.runtime["concurrency"], LONGEST * self.runtime["timeout"]
            self._hosts[name] = Host(name, *pace)
        return self._hosts[name]

    async def _in_thread(self, call: Callable[..., T], *values: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *values)


def without_request(url: str, spec: dict[str, Any]) -> Outcome | None:
    """Return the outcome of a URL that needs no request: not allowed, or a well-known name of "no image"."""
    try:
        parsed = parse_url(url)
        if is_no_image(parsed):
            return Outcome(MISSING, "placeholder", "the address is that of a placeholder")
        check_host(parsed, spec["hosts"], spec["private"])
    except RefusedError as error:
        return Outcome(FAILED, "refused", one_line(str(error)))
    return None


def is_no_image(url: URL) -> bool:
    """Return whether the last part of a URL's path is a well-known name of "no image", such as no-img-sm.gif."""
    return _NO_IMAGE.search(url.name) is not None


def _without_encoding(data: bytes, encoding: str, max_bytes: int) -> bytes:
    try:
        return decoded(data, encoding, max_bytes)
    except EncodingError as error:
        raise _NoImageError(error.kind, str(error)) from None


def _proxy_error(status: int, reason: str) -> UserError:
    return UserError(
        f"the proxy of the environment answers {status} {one_line(reason)}: put the name and password into http_proxy and "
        "https_proxy, as http://name:password@host:port"
    )


def _check(response: aiohttp.ClientResponse, host: Host, absent: Set[int]) -> None:
    if response.status in (404, 410) or response.status in absent:
        raise _NoImageError(f"HTTP {response.status}", f"HTTP {response.status}: there is no such image", MISSING)
    try:
        check_status(response.status, response.reason or "", response.headers)
    except TransientError as busy:
        host.hold(busy.wait)
        if response.status == 429 and "Retry-After" not in response.headers:
            host.slow_down()
        raise _RetryError(f"HTTP {response.status}", str(busy), busy.wait) from None
    except FetchError as error:
        raise _NoImageError(f"HTTP {response.status}", str(error)) from None


def _explain(error: BaseException) -> Outcome | None:
    """Return the outcome of a URL whose request raised `error`; None if the error is not about the request."""
    reason = one_line(hide_secrets(str(error))) or type(error).__name__
    match error:
        case _NoImageError():
            return Outcome(error.status, error.kind, reason)
        case RefusedError():
            return Outcome(FAILED, "refused", reason, passing=True)
        case UnresolvedError():
            return Outcome(FAILED, "no connection", reason, passing=True)
        case _RetryError():
            return Outcome(FAILED, error.kind, reason, passing=True)
        case TimeoutError():
            return Outcome(FAILED, "no answer in time", "no answer in time", passing=True)
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError() | ConnectionResetError():
            # Where it was cut is random, and a row of the manifest should not depend on that.
            return Outcome(FAILED, "connection cut", "the connection was cut", passing=True)
        case aiohttp.ClientConnectionError() | OSError():
            return Outcome(FAILED, "no connection", reason, passing=True)
        # ValueError: an invalid address in a redirect, or an unreadable header.
        case aiohttp.ClientError() | ValueError():
            return Outcome(FAILED, "bad answer", reason, passing=True)
    return None
