"""Retries and circuit breaker of an OpenAI-compatible server: one state for all requests of a job."""

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from typing import Any

import openai

from extractors.caption.openai_client import ChatClient, Completion, RejectedError, TransientError, UnavailableError

log = logging.getLogger(__name__)

PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds before the second attempt, doubled each time, and the most."""
FAILED_IN_A_ROW = 20
"""Failed requests without a completion in between that cast doubt on the server; at the start they end the job."""
SHARED_WAITS, MOST_WAITS = 8, 30
"""Pauses that one request may impose on all others, and those after which it fails."""


class CircuitBreaker:
    """Sends requests with retries; a server that asks for a pause pauses all of them, one that is down ends the job.

    A request that keeps failing is not proof of a broken server. A request that was answered before is sent again: if it
    is answered once more, the failing one is rejected alone; otherwise the server is waited for.

    Args:
        client: the server.
        attempts: failed attempts until a request is given up, if the server answers others.
        patience: seconds without any completion after which the job ends.
    """

    def __init__(self, client: ChatClient, attempts: int, patience: float) -> None:
        self.client, self.attempts, self.patience = client, attempts, patience
        self._answered: Mapping[str, Any] | None = None  # the last request that got a completion
        self._failed = 0  # requests since
        self._paused_until = 0.0
        self._answered_at = time.monotonic()

    @property
    def answered(self) -> bool:
        """Whether the server has answered any request so far."""
        return self._answered is not None

    def reset_clock(self) -> None:
        """Count `patience` from now."""
        self._answered_at = time.monotonic()

    async def complete(self, session: openai.AsyncOpenAI, request: Mapping[str, Any]) -> Completion:
        """Return the completion of a request.

        Raises:
            RejectedError: the server does not answer this request, though it answers others.
            UserError: no request can succeed: wrong address or key, or the server is down.
        """
        bad = waits = rejected = 0
        cleared = False  # whether the server answered another request since this one's last failure but one
        while True:
            while (left := self._paused_until - time.monotonic()) > 0:
                await asyncio.sleep(left)
            try:
                completion = await self._send(session, request)
            except UnavailableError as error:
                if error.wait > self.patience:
                    raise self.client.fatal(f"{error}, and asks for a pause of {error.wait:.0f} s") from None
                waits += 1
                pause, spent, reason = max(error.wait, _pause(waits)), waits > MOST_WAITS, f"{error}, {waits} times"
                if waits <= SHARED_WAITS:
                    self._pause_all(reason, pause)
            except TransientError as error:
                bad += 1
                pause, spent, reason = _pause(bad), bad >= self.attempts, f"{error}, {bad} times"
            except RejectedError as error:
                rejected += 1
                pause, spent, reason = _pause(rejected), True, str(error)
                if self.answered and self._failed < FAILED_IN_A_ROW:
                    self._failed += 1
                    raise
            else:
                self._answered = request
                return completion
            if spent:
                if cleared:
                    raise RejectedError(reason)
                cleared = await self._works(session, reason)
                if cleared:  # perhaps only since a moment ago, so this request gets one more attempt
                    continue
            silence = time.monotonic() - self._answered_at
            if silence > max(self.patience, 2 * self.client.timeout) and not await self._answers_again(session):
                silence = time.monotonic() - self._answered_at
                raise self.client.fatal(f"no completion for {silence:.0f} s, last failure: {reason}")
            await asyncio.sleep(pause)

    async def require_working(self, session: openai.AsyncOpenAI, request: Mapping[str, Any], failed: int) -> None:
        """Check a server that has answered none of `failed` requests with a harmless one.

        Raises:
            UserError: it does not answer that one either.
        """
        try:
            await self.complete(session, request)
        except RejectedError as error:
            raise self.client.fatal(
                f"{failed} requests got no caption, and neither did one for a plain white image: {error}"
            ) from None

    async def _send(self, session: openai.AsyncOpenAI, request: Mapping[str, Any]) -> Completion:
        completion = await self.client.complete(session, request)
        self._failed, self._answered_at = 0, time.monotonic()
        return completion

    async def _works(self, session: openai.AsyncOpenAI, reason: str) -> bool:
        """Return whether the server answers what it answered before, so that the failed request is at fault.

        Raises:
            RejectedError: it has answered nothing so far, so there is nothing to compare with.
            UserError: the same, after FAILED_IN_A_ROW requests.
        """
        if self.answered:
            return await self._answers_again(session)
        self._failed += 1
        if self._failed >= FAILED_IN_A_ROW:
            raise self.client.fatal(f"the first {self._failed} requests got no caption, the last one: {reason}")
        raise RejectedError(reason, early=True)

    async def _answers_again(self, session: openai.AsyncOpenAI) -> bool:
        try:
            return self._answered is not None and bool(await self._send(session, self._answered))
        except (TransientError, UnavailableError, RejectedError):
            return False

    def _pause_all(self, reason: str, seconds: float) -> None:
        # A server that is full or away is so for every request. SHARED_WAITS bounds what one request can impose.
        now = time.monotonic()
        if self._paused_until <= now:
            log.warning("%s: %s; all requests wait for %.1f s", self.client.url, reason, seconds)
        self._paused_until = max(self._paused_until, now + seconds)


def _pause(failures: int) -> float:
    # Jitter, so that requests that failed together don't come back together.
    return min(PAUSE * 2.0 ** min(failures - 1, 20), LONGEST_PAUSE) * random.uniform(1, 1.5)
