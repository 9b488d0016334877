"""Propagation of the streams of users and items over the user-item graph, a few streams at a time.

Streams do not depend on one another before the loss: large tables are propagated stream by stream, which divides their
memory by the number of streams and gives the same result to the last bit; and several processes that train one model
hold and propagate some streams each.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cm3.common.usage import return_free_memory
from cm3.model.graph import SparseMatrix
from cm3.model.layer_sums import Joint, LayerSums, Sides
from cm3.model.unit_rows import UnitRows

CPU_TABLE_BYTES = 2**28
"""Size of a table of users and items above which the CPU propagates fewer streams at a time."""

TABLE_BYTES = 2**32
"""The same on an accelerator, where more streams at a time mean fewer kernels."""


def propagate_streams(
    adjacency: SparseMatrix,
    users: Tensor,
    items: Tensor,
    layers: int,
    ids: Tensor | None = None,
    table_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return users (U, S d) and items (I, S d) after propagation: the sum of A^l x over the layers l = 0..`layers`.

    The rows of x are the users, each stream of which is normalised, then the items as they are. With `ids`, only the rows
    of these users are returned: a training step reads few (`cm3.model.layer_sums`).

    Args:
        adjacency: A, symmetric, (U + I, U + I); users have entries in the columns of items only, and items in those of users.
        users: (U, S, d) of S streams.
        items: (I, S d).
        layers: how many.
        ids: (n,) indices of users; repetitions are allowed. None: all.
        table_bytes: size of a table (U + I, d') that is propagated at a time; None: `CPU_TABLE_BYTES` or `TABLE_BYTES`.
    """
    found: tuple[Tensor, Tensor] = _Streams.apply(users, items, adjacency, layers, ids, table_bytes)
    return found


class _Streams(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        items: Tensor,
        adjacency: SparseMatrix,
        layers: int,
        ids: Tensor | None,
        table_bytes: int | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.adjacency, ctx.layers = adjacency, layers
        ctx.groups = list(_groups(users, items, table_bytes))
        sums = _sums(adjacency, layers, users, ids)
        norms = users.new_empty(*users.shape[:2], 1)
        by_user = _Columns(users, len(users if ids is None else ids), items.shape[1])
        by_item = _Columns(users, *items.shape)
        for streams, columns in ctx.groups:
            parts = sums.forward(UnitRows(users, norms, streams), items[:, columns])
            by_user.set(columns, parts[0])
            by_item.set(columns, parts[1])
            del parts  # before the tables of the next streams are made
        ctx.save_for_backward(users, norms, ids)
        return by_user.table, by_item.table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_user: Tensor, by_item: Tensor) -> tuple[Tensor | None, ...]:
        users, norms, ids = ctx.saved_tensors
        sums = _sums(ctx.adjacency, ctx.layers, users, ids)
        for_users = users.new_empty(users.shape)
        for_items = _Columns(by_item, *by_item.shape)
        for streams, columns in ctx.groups:
            room = for_users.view(len(users), -1)[:, columns]
            grad, grad_of_items = sums.backward(by_user[:, columns], by_item[:, columns], room)
            UnitRows(users, norms, streams).gradient(grad, out=for_users)
            for_items.set(columns, grad_of_items)
            del grad, grad_of_items
        if len(ctx.groups) > 1:
            return_free_memory()
        return for_users, for_items.table, None, None, None, None


def _sums(adjacency: SparseMatrix, layers: int, users: Tensor, ids: Tensor | None) -> LayerSums:
    return (Sides if users.device.type == "cpu" else Joint)(adjacency, layers, len(users), ids)


class _Columns:
    """A table that is set some columns at a time; columns of the whole width are not copied."""

    def __init__(self, like: Tensor, rows: int, width: int) -> None:
        self._like, self._shape = like, (rows, width)
        self._table: Tensor | None = None

    @property
    def table(self) -> Tensor:
        if self._table is None:
            self._table = self._like.new_empty(self._shape)
        return self._table

    def set(self, columns: slice, part: Tensor) -> None:
        if part.shape == self._shape:
            self._table = part
        else:
            self.table[:, columns] = part


def _groups(users: Tensor, items: Tensor, table_bytes: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield slices of the streams that are propagated at once, and of their columns."""
    count, width = users.shape[1:]
    most = table_bytes or (CPU_TABLE_BYTES if users.device.type == "cpu" else TABLE_BYTES)
    at_once = max(1, most // max((len(users) + len(items)) * width * users.element_size(), 1))
    for first in range(0, count, at_once):
        last = min(first + at_once, count)
        yield slice(first, last), slice(first * width, last * width)
