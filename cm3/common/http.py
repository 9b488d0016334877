"""HTTP conventions shared by all clients: offline mode, retryable statuses, Retry-After and exponential back-off."""

import os
import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

USER_AGENT = "cm3-pipeline (research; one polite client)"
LONGEST_WAIT = 300.0
"""Seconds that a Retry-After is followed for; beyond this, another mirror or another day is the better answer."""
LONGEST_PAUSE = 60.0
"""Seconds between two tries when the server asks for none."""
_RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})


class FetchError(Exception):
    """A permanent failure: another request for the same URL would fail again."""


class TransientError(Exception):
    """A temporary failure, worth another try; `wait` is the Retry-After of the server in seconds, else 0."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


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
