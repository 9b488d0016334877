"""Client of an OpenAI-compatible server: one request gives a completion or one of four kinds of failure."""

import asyncio
import logging
import math
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2
import openai

from cm3.common.errors import UserError
from cm3.common.http import is_offline, retry_after
from extractors.caption.openai_message import has_thought, text_of
from extractors.caption.openai_parameters import ParameterNames

MAX_BODY = 1 << 20
"""Bytes of the longest response that is read."""
_MAX_QUOTE = 200  # characters of a server's text in one message
_MIN_KEY = 8  # shorter keys are placeholders ("EMPTY", "x"), and their letters occur in every sentence
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS = frozenset({"host", "accept", "connection", "content-type", "content-length", "user-agent", "authorization"})
_FATAL = {
    402: "the account has to be paid for",
    403: "the key lacks permission",
    404: "unknown model or address; url ends in /v1 with most servers",
    405: "this address serves no chat completions",
}

# One line per request otherwise.
logging.getLogger("httpx2").setLevel(logging.WARNING)


class TransientError(Exception):
    """This attempt got no completion; another one may."""


class UnavailableError(Exception):
    """The server asks for a pause, or does not accept connections.

    Attributes:
        wait: seconds that the server asks for, 0 where it names none.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class RejectedError(Exception):
    """The server does not answer this request, however often it is sent.

    Attributes:
        early: no other request was answered so far, so the server may be at fault.
    """

    def __init__(self, reason: str, early: bool = False) -> None:
        super().__init__(reason)
        self.early = early


@dataclass(frozen=True)
class Completion:
    """A chat completion.

    Attributes:
        text: the answer; empty where the model only thought.
        thought: whether the server reports thoughts in a field of their own.
        tokens: generated tokens, 0 if the server does not report them.
        cut: whether the text ended at the limit of tokens.
        model, fingerprint: the model and system fingerprint that the server reports.
    """

    text: str
    tokens: int
    cut: bool
    model: str
    fingerprint: str
    thought: bool = False


class ChatClient:
    """An OpenAI-compatible server.

    Retries are not made here: the package's `max_retries` pauses one request only, retries no empty answer, and ignores
    Retry-After over two minutes (see `extractors.caption.openai_retry`).

    Args:
        url: the base URL, such as http://127.0.0.1:8000/v1.
        key_env: name of the environment variable that may hold the API key. The key appears in no message.
        concurrency: connections at once.
        timeout: seconds for one answer.

    Raises:
        UserError: the variable holds no API key, or the machine is offline and the server is another machine.
    """

    def __init__(self, url: str, key_env: str, concurrency: int, timeout: float) -> None:
        self.url, self.key_env, self.concurrency, self.timeout = url, key_env, concurrency, timeout
        self._key = os.environ.get(key_env, "").strip()
        if not all("!" <= letter <= "~" for letter in self._key):
            raise UserError(
                f"the environment variable {key_env} holds no API key: it contains blanks or non-ASCII letters"
            )
        parts = urlsplit(url)
        self.parameters = ParameterNames(url)
        local = parts.hostname in _LOCAL
        if is_offline() and not local:
            raise UserError(f"CM3_OFFLINE is set, so {url} is not asked; only a server on this machine would be")
        direct = local or proxy_bypass(parts.hostname or "")
        self._proxy = None if direct else getproxies().get(parts.scheme)

    def session(self) -> openai.AsyncOpenAI:
        """Return connections for one event loop, to be closed with `async with`."""
        http = openai.DefaultAsyncHttpxClient(
            proxy=self._proxy,
            trust_env=False,
            verify=ssl.create_default_context(),
            follow_redirects=False,  # a redirect would send images to a host that the config does not name
            limits=httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
            timeout=None,
            event_hooks={"request": [self._drop_headers], "response": [_bound_body]},
        )
        return openai.AsyncOpenAI(base_url=self.url, api_key=self._key or "none", max_retries=0, http_client=http)

    async def models(self, attempts: int) -> dict[str, str]:
        """Return the names of the served models, each with the weights behind it ("" if the server does not say).

        Raises:
            UserError: no server at the address, or the key is refused.
        """
        async with self.session() as session:
            patient = session.with_options(max_retries=attempts - 1, timeout=self.timeout)
            try:
                listed: Any = (await patient.get("/models", cast_to=httpx2.Response)).json()
                return {self.quote(str(one["id"])): self.quote(str(one.get("root") or "")) for one in listed["data"]}
            except openai.AuthenticationError as error:
                raise self._key_error(error) from None
            except (openai.APIConnectionError, TransientError) as error:
                reason = self._connection_error(error) if isinstance(error, openai.APIConnectionError) else error
                if isinstance(reason, UserError):
                    raise reason from None
                raise UserError(
                    f"{self.url}: no captioning server answers at this address ({reason}); start it, or correct url"
                ) from None
            except (openai.APIStatusError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
                return {}  # not every server lists its models

    async def complete(self, session: openai.AsyncOpenAI, request: Mapping[str, Any]) -> Completion:
        """Send one chat completion request, adapted to the parameters that the server accepts.

        Raises:
            TransientError: time-out, HTTP 5xx, 408 or 425, a broken, empty or oversized answer.
            UnavailableError: HTTP 429, 503 with Retry-After, no connection.
            RejectedError: HTTP 400 and the like.
            UserError: no request can succeed: HTTP 401 to 405, a redirect, a used up quota, no valid certificate.
        """
        while True:
            body = self.parameters.adapted(request)
            try:
                response = await self._post(session, body)
                break
            except openai.APIStatusError as error:
                # Each repetition has one refused parameter less.
                if not self.parameters.refused_by(error, body):
                    raise self._status_error(error) from None
        try:
            answer = response.json()
            choice = answer["choices"][0]
            message, end = choice["message"], choice.get("finish_reason")
            text, thought = text_of(message.get("content")), has_thought(message)
            tokens = (answer.get("usage") or {}).get("completion_tokens")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise TransientError(f"the answer is no chat completion ({self.quote(response.text)})") from None
        if not text.strip() and not thought:
            raise TransientError(f"the answer is empty (finish_reason {self.quote(str(end))})")
        return Completion(
            text=self._without_key(text),
            thought=thought,
            tokens=tokens if isinstance(tokens, int) and 0 <= tokens < 1 << 31 else 0,
            cut=end == "length",
            model=self._name(answer.get("model")),
            fingerprint=self._name(answer.get("system_fingerprint")),
        )

    async def _post(self, session: openai.AsyncOpenAI, body: Mapping[str, Any]) -> httpx2.Response:
        try:
            async with asyncio.timeout(self.timeout):  # httpx limits each read, not the whole answer
                # Not chat.completions.create, which takes twice the time to check the request and build typed answers.
                return await session.post("/chat/completions", cast_to=httpx2.Response, body=body)
        except TimeoutError:
            raise TransientError(f"no answer in {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise self._connection_error(error) from None
        except UnicodeEncodeError as error:  # half of a surrogate pair in an item's text
            raise RejectedError(f"the prompt is not valid Unicode ({error.reason})") from None

    def fatal(self, reason: str) -> UserError:
        """Return the error that ends the job."""
        return UserError(
            f"{self.url}: {reason}. Finished shards are kept: fix the server or the settings, and run the same command again"
        )

    def quote(self, text: str) -> str:
        """Return text from the server as one short, printable line without the key."""
        line = " ".join(self._without_key(text[: 1 << 14]).split()) or "empty"
        printable = "".join(letter if letter.isprintable() else "?" for letter in line)
        return printable if len(printable) <= _MAX_QUOTE else f"{printable[:_MAX_QUOTE]}..."

    def _name(self, value: Any) -> str:
        return self.quote(value) if isinstance(value, str) and value.strip() else ""

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) >= _MIN_KEY else text

    async def _drop_headers(self, request: httpx2.Request) -> None:
        # The package adds this machine's platform, and headers from OPENAI_* variables that may be another service's.
        for name in set(request.headers) - _HEADERS:
            del request.headers[name]
        request.headers["Authorization"] = f"Bearer {self._key}"
        if not self._key:
            del request.headers["Authorization"]

    def _key_error(self, error: openai.APIStatusError) -> UserError:
        variable = f"the environment variable {self.key_env}"
        why = f"the key in {variable} is refused" if self._key else f"a key is required, and {variable} holds none"
        return UserError(f"{self.url}: HTTP 401, {why} ({self._message(error)})")

    def _message(self, error: openai.APIStatusError) -> str:
        body = error.body
        return self.quote(str(body.get("message") or error.response.text if isinstance(body, dict) else body or ""))

    def _status_error(self, error: openai.APIStatusError) -> Exception:
        status, reason = error.status_code, f"HTTP {error.status_code} ({self._message(error)})"
        if status == 401:
            return self._key_error(error)
        if status in _FATAL or "insufficient_quota" in error.response.text:
            return self.fatal(f"{reason}, {_FATAL.get(status, 'the quota is used up')}")
        if 300 <= status < 400:
            return self.fatal(f"HTTP {status}, a redirect, which is not followed; correct url")
        wait = retry_after(error.response.headers.get("Retry-After", ""), longest=math.inf)
        if status == 429 or (status == 503 and wait):
            return UnavailableError(reason, wait)
        return TransientError(reason) if status >= 500 or status in (408, 425) else RejectedError(reason)

    def _connection_error(self, error: BaseException) -> Exception:
        kind = error.__cause__
        while (cause := error.__cause__ or error.__context__) is not None:
            error = cause  # httpx's own message is only "All connection attempts failed"
        reason = self.quote(f"{type(error).__name__}: {error}")
        if isinstance(error, ssl.SSLError):
            return UserError(f"{self.url}: no secure connection ({reason})")
        if isinstance(kind, httpx2.ConnectError):
            return UnavailableError(f"cannot connect ({reason})")
        return TransientError(reason)


class _BoundedStream(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > MAX_BODY:
                raise TransientError(f"an answer of over {MAX_BODY} bytes")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _bound_body(response: httpx2.Response) -> None:
    if response.headers.get("Content-Encoding", "identity") != "identity":  # its size is known only once it is expanded
        raise TransientError("a compressed answer, which was not asked for")
    if isinstance(response.stream, httpx2.AsyncByteStream):
        response.stream = _BoundedStream(response.stream)
