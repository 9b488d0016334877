"""Precision of a model's arithmetic, and batches that shrink when memory runs out."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from cm3.common.errors import UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


def torch_dtype(precision: str) -> "torch.dtype":
    """Return torch's type of a model's weights for a precision setting."""
    import torch

    return {"float32": torch.float32, "autocast": torch.float32, "bfloat16": torch.bfloat16}[precision]


def arithmetic(device: str, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return what forward passes run within: `autocast` takes bfloat16 for products and float32 for norms and sums."""
    import torch

    if precision == "autocast":
        return torch.autocast(device, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the host."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in message or "can't allocate memory" in message


class Batch:
    """A batch size that is halved when memory runs out, and stays there.

    Attributes:
        size: inputs (or tokens) per forward pass at present.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def attempt(self, forward: Callable[[Sequence[T]], R], part: Sequence[T]) -> R | None:
        """Return forward(part); None after an out-of-memory error, with `size` halved: try a smaller part.

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
                    f"memory ran out on a single input ({error}). Take a smaller model, precision: bfloat16, "
                    "device: cpu, or a machine with more memory"
                ) from error
        self.size = max(1, self.size // 2)
        log.warning("memory ran out on %d inputs at once; going on with a batch size of %d", len(part), self.size)
        _release()
        return None

    def all(self, forward: Callable[[Sequence[T]], Iterable[R]], inputs: Sequence[T]) -> list[R]:
        """Return forward's results for all inputs, at most `size` at a time."""
        results: list[R] = []
        while len(results) < len(inputs):
            part = self.attempt(forward, inputs[len(results) : len(results) + self.size])
            results.extend(part if part is not None else [])
        return results


def _release() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
