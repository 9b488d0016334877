"""What every download shares: staying offline, trying again, and reading what a server answers."""

import os
import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path

import aiohttp
import tenacity

from cm3.common.errors import UserError

USER_AGENT = "cm3-pipeline (research; one polite client)"
# A server may ask for any patience; beyond this, another mirror or another day is the better answer.
LONGEST_WAIT = 300.0
LONGEST_PAUSE = 60.0
"""Seconds between two tries when the server asks for none."""
_LONGEST_REASON = 300
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class FetchError(Exception):
    """This URL will not give what is wanted, however often it is asked."""


class BusyError(Exception):
    """Not now: worth another try, after `wait` seconds if the server said so."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


TRANSIENT = (BusyError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError, TimeoutError)
"""What another try may heal: answers that say so, lost connections, silence."""


def offline() -> bool:
    """Whether the environment variable CM3_OFFLINE forbids to open a socket."""
    return os.environ.get("CM3_OFFLINE", "") not in ("", "0")


def refuse_offline(url: str, path: Path) -> None:
    """Raise UserError when offline, saying which file is to be put where."""
    if offline():
        raise UserError(f"CM3_OFFLINE is set, so nothing is fetched: put the file {url} at {path} yourself")


def check_status(response: aiohttp.ClientResponse) -> None:
    """Raise BusyError on 429, 5xx and the like, FetchError on every other status but 200."""
    if response.status == 200:
        return
    told = f"HTTP {response.status} {response.reason or ''}".strip()
    if response.status in _TRY_AGAIN:
        raise BusyError(told, retry_after(response.headers.get("Retry-After", "")))
    raise FetchError(told)


def retry_after(value: str) -> float:
    """Return the seconds that a Retry-After header asks for (a number or a date), at most LONGEST_WAIT."""
    try:
        seconds = float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)


def back_off(failures: int, pause: float, error: BaseException | None) -> float:
    """Return the seconds to wait after so many failures in a row.

    Args:
        failures: at least 1.
        pause: seconds after the first, doubled each time, with jitter, up to a minute; a server's own Retry-After is
            kept to if it is longer.
        error: the last failure.
    """
    # Jitter, so that many clients that a server lost at one moment do not come back at one moment.
    seconds = min(pause * 2.0 ** min(failures - 1, 30) + random.uniform(0, pause), LONGEST_PAUSE)
    return max(seconds, error.wait if isinstance(error, BusyError) else 0.0)


def trying(attempts: int, pause: float, told: Callable[[str], None]) -> tenacity.AsyncRetrying:
    """Return tenacity's loop: BusyError and lost connections are tried again, later each time.

    Args:
        attempts: tries in all.
        pause: seconds before the second try, from then on as `back_off`.
        told: called with the reason before each wait.
    """

    def wait(state: tenacity.RetryCallState) -> float:
        return back_off(state.attempt_number, pause, state.outcome.exception() if state.outcome else None)

    def before_sleep(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        seconds = state.next_action.sleep if state.next_action else 0.0
        told(f"{reason(error)}; try {state.attempt_number + 1} of {attempts} in {seconds:.1f} s")

    return tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(attempts),
        wait=wait,
        retry=tenacity.retry_if_exception_type(TRANSIENT),
        before_sleep=before_sleep,
        reraise=True,
    )


def reason(error: BaseException | None) -> str:
    """Return what went wrong, in words: one line, however much of an answer a library quotes."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientPayloadError):
        return f"the connection was cut ({_line(str(error))})"
    return _line(str(error)) or type(error).__name__


def _line(text: str) -> str:
    printable = (letter if letter.isprintable() else " " for letter in text[: 2 * _LONGEST_REASON])
    line = " ".join("".join(printable).split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."
