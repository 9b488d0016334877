"""Batch size that is halved when memory runs out."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from cm3.common.device import is_out_of_memory
from cm3.common.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


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


def _release() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
