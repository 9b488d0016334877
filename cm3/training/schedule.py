"""The number of batches per step, the learning rate schedule, and the request to stop."""

import itertools
import math
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from cm3.config import Training

if TYPE_CHECKING:  # the plan of a run reads this module, and imports no torch
    from cm3.model.sampling import Batch

STEPS = 50
_LEAST_BATCH = 2048


def batches_per_step(settings: Training, n_pairs: int) -> int:
    """Return how many batches share one propagation and one step: the setting, or for auto what the data ask for.

    A propagation costs as much as its graph has edges. With about `STEPS` steps an epoch, whatever the number of training
    pairs, an epoch grows in proportion to them. Less than twice that many batches of 2,048 pairs have a step each.
    """
    if settings.batches_per_step != "auto":
        return settings.batches_per_step
    return max(1, n_pairs // (STEPS * max(settings.batch_size, _LEAST_BATCH)))


def grouped(batches: "Iterable[Batch]", size: int) -> "Iterator[list[Batch]]":
    """Yield lists of `size` batches, the last of which may be shorter."""
    rest = iter(batches)
    while group := list(itertools.islice(rest, size)):
        yield group


def lr_factor(settings: Training, epoch: int, batch: int, batches: int) -> float:
    """Return the factor of the learning rate at a step. It depends on the step alone, so runs can resume.

    Warm-up rises linearly over the first `warmup_epochs`; `cosine` then falls to 0 at the last of `epochs`,
    `exponential` by the factor `lr_decay` an epoch; `constant` is 1.

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
        found: float = settings.lr_decay ** (progress - settings.warmup_epochs)
        return found
    return 1.0


class GracefulStop:
    """Context manager that turns the first SIGTERM or SIGINT (Ctrl-C) into a request to stop.

    A second SIGINT interrupts, and so does a second SIGTERM that does not follow a SIGINT: after Ctrl-C, which reaches all
    processes of a terminal, Snakemake ends too, and its jobs get a SIGTERM for that.

    Attributes:
        requested: the number of the signal that has arrived, None before.
    """

    requested: int | None = None

    def __init__(self, enabled: bool = True) -> None:
        """With `enabled` false the first signal is ignored: another process decides, and ends this one."""
        self.enabled = enabled

    def __enter__(self) -> "GracefulStop":
        # Signals can be handled in the main thread only.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            # A job in the background of a shell ignores SIGINT.
            taken = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
            self._before: dict[int, Any] = {number: signal.signal(number, self._request) for number in taken}
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.enabled and self.requested is None:
            self.requested = number
        signal.signal(number, self._before[number])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            for number, before in self._before.items():
                signal.signal(number, before)
