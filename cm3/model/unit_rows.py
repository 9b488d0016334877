"""Streams of users, each divided by its norm, as a table of some streams at a time, and its gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-12  # lower bound of a divisor, as in torch.nn.functional.normalize


@dataclass(frozen=True)
class UnitRows:
    """Some streams of (U, S, d) users, divided by their norms.

    Attributes:
        users: (U, S, d).
        norms: (U, S, 1), at least 1e-12; `table` writes those of its streams.
        streams: those of S that are meant, s of them.
    """

    users: Tensor
    norms: Tensor
    streams: slice

    def table(self) -> Tensor:
        """Return the rows, (U, s d), in a new table."""
        width = len(range(self.users.shape[1])[self.streams]) * self.users.shape[2]
        x = self.users.new_empty(len(self.users), width)
        for chunk in self._chunks():
            given, norm = self._of(chunk)
            torch.linalg.vector_norm(given, dim=2, keepdim=True, out=norm)
            torch.div(given, norm.clamp_min_(_TINY), out=x[chunk].unflatten(1, given.shape[1:]))
        return x

    def add_to(self, y: Tensor) -> Tensor:
        """Add the rows to `y`, (U, s d), in place, and return it; `table` was called before."""
        for chunk in self._chunks():
            given, norm = self._of(chunk)
            y[chunk].unflatten(1, given.shape[1:]).add_(given / norm)
        return y

    def gradient(self, grad: Tensor, out: Tensor) -> None:
        """Write (g - x <x, g>) / norm, the gradient in the users' streams, to their place in `out`, (U, S, d).

        `grad` is the gradient g in the rows, (U, s d); it may be in the memory of the result.
        """
        for chunk in self._chunks():
            given, norm = self._of(chunk)
            x, g = given / norm, grad[chunk].unflatten(1, given.shape[1:])
            along = (x * g).sum(2, keepdim=True)
            torch.addcmul(g, x, along, value=-1, out=out[chunk, self.streams]).div_(norm)

    def _of(self, chunk: slice) -> tuple[Tensor, Tensor]:
        return self.users[chunk, self.streams], self.norms[chunk, self.streams]

    def _chunks(self) -> list[slice]:
        """Return slices of users: on the CPU their rows fit the cache."""
        count = len(self.users)
        size = 2048 if self.users.device.type == "cpu" else max(count, 1)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]
