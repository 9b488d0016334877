"""The learning rate over a run, and the wish to stop."""

import math
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from cm3.config import Training


def lr_factor(settings: Training, epoch: int, batch: int, batches: int) -> float:
    """Return what the learning rate is multiplied by at a step; it depends on the step alone, so runs can go on.

    Warm-up rises linearly over the first `warmup_epochs`; `cosine` then falls to 0 at the last of `epochs`,
    `exponential` by the factor `lr_decay` an epoch, `constant` not at all.

    Args:
        epoch: from 1.
        batch: from 0.
        batches: in an epoch.
    """
    progress = epoch - 1 + batch / batches
    if progress < settings.warmup_epochs:
        return min(1.0, (progress + 1 / batches) / settings.warmup_epochs)
    if settings.schedule == "cosine":
        length = max(settings.epochs - settings.warmup_epochs, 1)
        return 0.5 * (1 + math.cos(math.pi * min((progress - settings.warmup_epochs) / length, 1)))
    if settings.schedule == "exponential":
        return settings.lr_decay ** (progress - settings.warmup_epochs)
    return 1.0


class Stopping:
    """Whether SIGTERM has asked to stop: a context manager that takes the first one as a wish, the next as an order.

    One that does not heed it leaves the decision to another process, which ends this one.
    """

    asked = False

    def __init__(self, heeds: bool = True) -> None:
        self.heeds = heeds

    def __enter__(self) -> "Stopping":
        # Signals can be handled in the main thread alone; elsewhere somebody else does it.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before: Any = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.heeds
        signal.signal(signal.SIGTERM, self._before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)
