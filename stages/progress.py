"""Progress for people (a bar on a terminal) and for logs (one line per so many items)."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger(__name__)


class Progress:
    """Counts items of a long stage: a bar with rate and ETA on a terminal, a log line every `seconds` seconds.

    Use as a context manager; call `advance(n, **counts)` with counts such as ok=.., missing=.. to show.
    """

    def __init__(self, total: int, unit: str, seconds: float = 10.0) -> None:
        self.total, self.unit, self.seconds = total, unit, seconds
        self.done = 0
        self.counts: dict[str, int] = {}

    def __enter__(self) -> "Progress":
        self.started = self.last = time.monotonic()
        self.bar = tqdm(
            total=self.total, unit=f" {self.unit}", disable=not sys.stderr.isatty(), leave=False, dynamic_ncols=True
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
        rate = self.done / elapsed
        left = (self.total - self.done) / rate if rate else float("inf")
        counts = "".join(f", {count} {name}" for name, count in self.counts.items())
        log.info("%d of %d %s, %.1f/s, %.0f s left%s", self.done, self.total, self.unit, rate, left, counts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        if kind is None and self.total:
            self._log_line()
