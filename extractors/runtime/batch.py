"""Batch size that is halved when memory runs out, and on a GPU raised to what its memory holds."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from cm3.common.device import is_out_of_memory
from cm3.common.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
_FILLED = 0.6
"""Fraction of the free memory that a batch may fill."""


class Batch:
    """A batch size that is halved when memory runs out, and not raised again.

    Attributes:
        size: present number of inputs (or tokens) per forward pass.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def attempt(self, forward: Callable[[Sequence[T]], R], part: Sequence[T]) -> R | None:
        """Return forward(part); None after an out-of-memory error, with `size` halved: the caller tries a smaller part.

        Raises:
            UserError: memory ran out on a single input.
        """
        try:
            return forward(part)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                raise UserError(
                    f"memory ran out on a single input ({error}). Use a smaller model, precision: bfloat16, "
                    "device: cpu, or a machine with more memory"
                ) from error
        self.size = max(1, self.size // 2)
        log.warning("out of memory with %d inputs; continuing with a batch size of %d", len(part), self.size)
        _release()
        return None

    def all(self, forward: Callable[[Sequence[T]], Iterable[R]], inputs: Sequence[T]) -> list[R]:
        """Return forward's results for all inputs, in batches of at most `size`."""
        results: list[R] = []
        while len(results) < len(inputs):
            part = self.attempt(forward, inputs[len(results) : len(results) + self.size])
            results.extend(part if part is not None else [])
        return results


class MemoryMeter(Protocol):
    """Memory of a device around one batch, in bytes."""

    def start(self) -> None:
        """Begin to measure."""

    def used(self) -> int:
        """Return the most memory that was used in addition since `start`."""

    def free(self) -> int:
        """Return the memory that is free for the next batch."""


class MeasuredBatch(Batch):
    """A batch size that a first full batch raises to what fits into the free memory.

    Args:
        size: inputs of the first batch.
        most: largest size.
        meter: the memory of the device.
    """

    def __init__(self, size: int, most: int, meter: MemoryMeter) -> None:
        super().__init__(size)
        self._most, self._meter, self._measured = most, meter, False

    def attempt(self, forward: Callable[[Sequence[T]], R], part: Sequence[T]) -> R | None:
        """Return forward(part) as `Batch.attempt` does; measure the first full batch.

        Raises:
            UserError: memory ran out on a single input.
        """
        if self._measured or len(part) < self.size:
            return super().attempt(forward, part)
        self._measured = True
        self._meter.start()
        result = super().attempt(forward, part)
        if result is not None:
            fitting = fitting_size(self._meter.free(), self._meter.used(), len(part), self._most)
            self.size = max(self.size, fitting)
            log.info("a batch of %d inputs leaves room for %d", len(part), self.size)
        return result


def fitting_size(free: int, used: int, size: int, most: int) -> int:
    """Return the number of inputs per batch that fits into memory, at least 1.

    Args:
        free: free bytes.
        used: bytes that a batch of `size` inputs used.
        size: inputs of that batch.
        most: largest result.
    """
    # Later inputs may be larger than those of the first batch.
    return most if used <= 0 else max(1, min(most, int(_FILLED * free * size / used)))


class CudaMemory:
    """The memory of the current CUDA device, as torch allocates it."""

    def start(self) -> None:
        """Begin to measure."""
        import torch

        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def used(self) -> int:
        """Return the most memory that was allocated in addition since `start`."""
        import torch

        return int(torch.cuda.max_memory_allocated()) - self._before

    def free(self) -> int:
        """Return the free memory of the device, with what torch holds without using it."""
        import torch

        return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


def _release() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
