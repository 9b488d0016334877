"""Progress for people (a bar on a terminal) and for logs (one line per so many items)."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger(__name__)


class Progress:
    """Counts items of a long stage: a bar with rate and ETA on a terminal, a log line every `seconds` seconds.

    Use as a context manager; call `advance(n, **counts)` with counts such as ok=.., missing=.. to show. A total of 0
    is an unknown one. Of a stage that goes on where it was, `start` items are done and do not count for the rate.
    """

    def __init__(self, total: int, unit: str, seconds: float = 10.0, start: int = 0) -> None:
        self.total, self.unit, self.seconds = total, unit, seconds
        self.done = self.start = start
        self.counts: dict[str, int] = {}

    def __enter__(self) -> "Progress":
        self.started = self.last = time.monotonic()
        self.bar = tqdm(
            total=self.total or None,
            initial=self.start,
            unit=f" {self.unit}",
            disable=not sys.stderr.isatty(),
            leave=False,
            dynamic_ncols=True,
        )
        return self

    def advance(self, n: int = 1, **counts: int) -> None:
        """Count `n` more items done, and add `counts` to the named counts."""
        self.done += n
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.bar.update(n)
        if counts:
            self.bar.set_postfix(self.counts, refresh=False)
        if time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            self._log_line()

    def _log_line(self) -> None:
        elapsed = max(time.monotonic() - self.started, 1e-9)
        rate = (self.done - self.start) / elapsed
        left = (self.total - self.done) / rate if rate else float("inf")
        counts = "".join(f", {count} {name}" for name, count in self.counts.items())
        if self.total:
            line = f"{self.done} of {self.total} {self.unit}, {rate:.1f} {self.unit}/s, {left:.0f} s left"
        else:
            line = f"{self.done} {self.unit}, {rate:.1f} {self.unit}/s"
        log.info("%s%s", line, counts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        if kind is None and self.total:
            self._log_line()
