"""HTTP conventions shared by all clients: offline mode, secrets in URLs, retryable statuses, Retry-After and back-off."""

import json
import os
import random
import re
import socket
import time
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from urllib.parse import unquote

from cm3.common.errors import UserError

USER_AGENT = "cm3-pipeline (research; one polite client)"
LONGEST_WAIT = 300.0
"""Seconds that a Retry-After is followed for; beyond this, another mirror or another day is the better answer."""
LONGEST_PAUSE = 60.0
"""Seconds between two tries when the server asks for none."""
SECRET_URLS = "CM3_SECRET_URLS"
"""Environment variable with the URLs that a command line only refers to (`conceal`)."""
_RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)
_USER_INFO = re.compile(r"[^\s/:@'\"]+:[^\s/@'\"]+@(?=[\w.\[])")
_SHORTEST_SECRET = 4
# Names that resolve for a while to nothing (EAI_AGAIN) are not among these.
_NO_SUCH_NAME = frozenset(
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA", "EAI_FAIL") if hasattr(socket, name)
)


class FetchError(Exception):
    """A permanent failure: another request for the same URL would fail again."""


class TransientError(Exception):
    """A temporary failure, worth another try; `wait` is the Retry-After of the server in seconds, else 0."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class UnresolvedError(FetchError):
    """The host name has no address."""


def resolution_error(host: str, error: OSError) -> UnresolvedError | None:
    """Return the error to raise if the resolver says that a host name does not exist; None if another try may help.

    Args:
        error: raised by getaddrinfo.
    """
    if error.errno not in _NO_SUCH_NAME:
        return None
    return UnresolvedError(
        f"the host name {host} cannot be resolved ({error.strerror}); check its spelling and the network"
    )


def without_secrets(url: str) -> str:
    """Return a URL without user, password, query and fragment, any of which may hold a secret; equal if it has none."""
    scheme, _, location, _ = _parts(url)
    return scheme + location


def _parts(url: str) -> tuple[str, str, str, str]:
    """Return scheme with ://, user info, host and path, and query with fragment of a URL that need not be valid."""
    scheme, separator, rest = url.partition("://") if "://" in url else ("", "", url)
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    port = re.sub(r"^\[[^]]*\]", "", authority).partition(":")[2]
    user_info = ""
    if "@" in authority:
        user_info = authority.rpartition("@")[0]
    elif "@" in rest and port and not port.isdigit():
        user_info = rest.rpartition("@")[0]  # A password with / ? or # in it.
    rest = rest.removeprefix(f"{user_info}@") if user_info else rest.removeprefix("@")
    location = re.split(r"[?#]", rest, maxsplit=1)[0]
    return scheme + separator, user_info, location, rest.removeprefix(location)


def hide_secrets(text: str, *urls: str) -> str:
    """Return a message without the secrets of the URLs in it, and without those of `urls` wherever it quotes them."""
    text = _USER_INFO.sub("", _URL.sub(lambda found: without_secrets(found[0]), text))
    for secret in sorted({secret for url in urls for secret in _secrets_of(url)}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secrets_of(url: str) -> set[str]:
    _, user_info, _, query = _parts(url)
    fields = [field.partition("=") for field in re.split(r"[?&#]", query)]
    parts = {user_info, *re.split(r"[:/?#@]", user_info), query[1:], *(value or name for name, _, value in fields)}
    parts |= {unquote(part) for part in parts}
    return {part for part in parts if len(part) >= _SHORTEST_SECRET}


def conceal(urls: Iterable[str]) -> list[str]:
    """Return URLs for the command line of a child process, which anybody can read: those with secrets as references.

    The URLs themselves are passed on in an environment variable of this process, where `reveal` finds them.
    """
    known: dict[str, str] = json.loads(os.environ.get(SECRET_URLS, "{}"))
    references = {url: reference for reference, url in known.items()}
    concealed = []
    for url in urls:
        plain = without_secrets(url)
        if plain == url:
            concealed.append(url)
            continue
        reference = references.setdefault(url, f"{plain}#secret-{len(references) + 1}")
        known[reference] = url
        concealed.append(reference)
    if known:
        os.environ[SECRET_URLS] = json.dumps(known)
    return concealed


def reveal(urls: Iterable[str]) -> list[str]:
    """Return the URLs that a parent process passed to `conceal`.

    Raises:
        UserError: the environment does not hold one of them.
    """
    known: dict[str, str] = json.loads(os.environ.get(SECRET_URLS, "{}"))
    revealed = []
    for url in urls:
        if "#secret-" in url and url not in known:
            raise UserError(f"{url}: the environment variable {SECRET_URLS} does not hold this URL; run Snakemake")
        revealed.append(known.get(url, url))
    return revealed


def is_offline() -> bool:
    """Return whether the environment variable CM3_OFFLINE forbids network connections."""
    return os.environ.get("CM3_OFFLINE", "") not in ("", "0")


def check_status(status: int, reason: str, headers: Mapping[str, str]) -> None:
    """Raise TransientError for 429, 5xx and the like, FetchError for every other status except 200.

    Args:
        reason: the reason phrase of the status line.
        headers: of the response; names are case-insensitive.
    """
    if status == 200:
        return
    text = f"HTTP {status} {reason}".strip()
    if status in _RETRYABLE:
        raise TransientError(text, retry_after(headers.get("Retry-After", "")))
    raise FetchError(text)


def retry_after(value: str, longest: float = LONGEST_WAIT) -> float:
    """Return the seconds that a Retry-After header asks for (a number or a date), at most `longest`; 0 for neither."""
    try:
        seconds = float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), longest)


def back_off(failures: int, pause: float, error: BaseException | None) -> float:
    """Return the seconds to wait after a number of consecutive failures.

    Args:
        failures: at least 1.
        pause: seconds after the first failure, doubled each time, with jitter, up to LONGEST_PAUSE; a longer
            Retry-After of the server takes precedence.
        error: the last failure.
    """
    # Jitter, so that clients that failed at the same moment do not retry at the same moment.
    seconds = min(pause * 2.0 ** min(failures - 1, 30) + random.uniform(0, pause), LONGEST_PAUSE)
    return max(seconds, error.wait if isinstance(error, TransientError) else 0.0)


def one_line(text: str, longest: int = 160) -> str:
    """Return untrusted text as one line of printable characters, cut to `longest` characters."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
