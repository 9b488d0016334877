"""What an OpenAI-compatible server answers: a completion, or one of the ways to refuse it."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

from cm3.common.errors import UserError

_LONGEST_TOLD = 200
_SHORTEST_KEY = 8  # a shorter one is a stand-in ("EMPTY", "x"), and its letters occur in every sentence
_NEVER = {
    402: "the account has to be paid for",
    403: "the key may not do this",
    404: "there is no such model or no such address; url ends in /v1 with most servers",
    405: "no chat completions are served at this address",
}


class RefusedError(Exception):
    """This request gets no answer, however often it is sent.

    Attributes:
        early: no other one got an answer so far, so the server may have been at fault.
    """

    def __init__(self, reason: str, early: bool = False) -> None:
        super().__init__(reason)
        self.early = early


class BadError(Exception):
    """No proper answer this time; another try may get one."""


class WaitError(Exception):
    """The server wants to be left alone for a while, or is not to be reached at all."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Reply:
    """A completion.

    Attributes:
        tokens: generated tokens, 0 where the server doesn't tell.
        cut: whether it ended at the limit of tokens.
        model, fingerprint: what the server says that wrote it.
    """

    text: str
    tokens: int
    cut: bool
    model: str
    fingerprint: str


@dataclass(frozen=True)
class Replies:
    """Reads the answers of the server at `url`; the key from the environment variable `key_env` is in no message."""

    url: str
    key_env: str
    key: str = field(repr=False)

    def stop(self, reason: str) -> UserError:
        """Return the error that ends a job."""
        return UserError(
            f"{self.url}: {reason}. Finished shards stay: mend the server or the settings, and run the same command again"
        )

    def no_key(self, body: bytes) -> UserError:
        """Return the error for an answer of 401, which names the variable that the key is taken from."""
        name = f"the environment variable {self.key_env}"
        why = f"the key in {name} is refused" if self.key else f"a key is wanted, and {name} holds none"
        return UserError(f"{self.url}: HTTP 401, {why} ({self._told(body)})")

    def reply(self, status: int, headers: Mapping[str, str], body: bytes) -> Reply:
        """Return the completion that an answer holds.

        Raises:
            BadError: another try may do better: 5xx, no completion, an empty one.
            WaitError: 429, or 503 with Retry-After.
            RefusedError: 400 and the like: this request will not be answered.
            UserError: no request will be: 401, 403, 404, a redirect, a quota that is used up.
        """
        if status == 200:
            return self._completion(body)
        told = f"HTTP {status} ({self._told(body)})"
        if status == 401:
            raise self.no_key(body)
        if status in _NEVER or b"insufficient_quota" in body:
            raise self.stop(f"{told}, {_NEVER.get(status, 'the quota is used up')}")
        if 300 <= status < 400:
            raise self.stop(f"HTTP {status}, it sends requests elsewhere, which is not followed; correct url")
        wait = retry_after(headers.get("Retry-After", ""))
        if status == 429 or (status == 503 and wait):
            raise WaitError(told, wait)
        if status >= 500 or status in (408, 425):
            raise BadError(told)
        raise RefusedError(told)

    def _completion(self, body: bytes) -> Reply:
        try:
            data = json.loads(body)
            choice = data["choices"][0]
            text, end = choice["message"]["content"], choice.get("finish_reason")
            tokens = (data.get("usage") or {}).get("completion_tokens")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise BadError(f"the answer is no chat completion ({self._told(body)})") from None
        if not isinstance(text, str) or not text.strip():
            raise BadError(f"the answer is empty (finish_reason {self.line(str(end))})")
        counted = tokens if isinstance(tokens, int) and 0 <= tokens < 1 << 31 else 0
        model, mark = (
            self.line(name) if isinstance(name, str) else ""
            for name in (data.get("model"), data.get("system_fingerprint"))
        )
        return Reply(self._hidden(text), counted, end == "length", model, mark)

    def _told(self, body: bytes) -> str:
        """Return the message of an error's body, or how the body begins."""
        text = body[: 1 << 14].decode("utf-8", "replace")
        try:
            error = json.loads(text).get("error")
            text = str(error.get("message") or text if isinstance(error, dict) else error or text)
        except (ValueError, AttributeError, RecursionError):
            pass  # no JSON: quoted as it is
        return self.line(text) or "empty"

    def line(self, text: str) -> str:
        """Return a stranger's text as one line that can be shown: printable, short, without the key."""
        line = " ".join(self._hidden(text).split())
        printable = "".join(letter if letter.isprintable() else "?" for letter in line)
        return printable if len(printable) <= _LONGEST_TOLD else f"{printable[:_LONGEST_TOLD]}..."

    def _hidden(self, text: str) -> str:
        return text.replace(self.key, "***") if len(self.key) >= _SHORTEST_KEY else text


def retry_after(value: str) -> float:
    """Return the seconds that a Retry-After header asks for (a number or a date); 0 for none or nonsense."""
    try:
        return max(
            0.0, float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
        )
    except (ValueError, OverflowError):
        return 0.0
