"""Propagation of the streams of users and items over the user-item graph, a few streams at a time.

Streams do not depend on one another before the loss: large tables are propagated stream by stream, which divides their
memory by the number of streams and gives the same result to the last bit; and several processes that train one model
propagate some streams each.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cm3.common.distributed import ProcessShard
from cm3.model.graph import Entries, SparseMatrix, sum_of_layers

CPU_TABLE_BYTES = 2**28
"""Size of a table of users and items above which the CPU propagates fewer streams at a time."""

TABLE_BYTES = 2**32
"""The same on an accelerator, where more streams at a time mean fewer kernels."""

_TINY = 1e-12  # lower bound of a divisor, as in torch.nn.functional.normalize


def propagate_streams(
    adjacency: SparseMatrix,
    users: Tensor,
    items: Tensor,
    layers: int,
    ids: Tensor | None = None,
    table_bytes: int | None = None,
    shard: ProcessShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Return users (U, S d) and items (I, S d) after propagation: the sum of A^l x over the layers l = 0..`layers`.

    The rows of x are the users, each stream of which is normalised, then the items as they are. With `ids`, only the rows
    of these users are returned: a training step reads few. On the CPU the last product then leaves out the rows of the
    other users, and the first one backward their columns, where the gradient is 0; the order of each sum stays.

    Args:
        adjacency: A, symmetric, (U + I, U + I); users have entries in the columns of items only, and items in those of users.
        users: (U, S, d) of S streams.
        items: (I, S d).
        layers: how many.
        ids: (n,) indices of users; repetitions are allowed. None: all.
        table_bytes: size of a table (U + I, d') that is propagated at a time; None: `CPU_TABLE_BYTES` or `TABLE_BYTES`.
        shard: of several processes, each of which propagates its streams and gets the rows of all. The gradients that a
            process gets are those of its streams for the loss of all processes, and 0 for the other streams.
    """
    found: tuple[Tensor, Tensor] = _Streams.apply(users, items, adjacency, layers, ids, table_bytes, shard)
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
        shard: ProcessShard | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.adjacency, ctx.layers, ctx.shard = adjacency, layers, shard
        ctx.groups = list(_groups(users, items, table_bytes, shard))
        ctx.few = ids is not None and layers > 0 and users.device.type == "cpu" and 2 * len(ids) <= len(users)
        last = (adjacency.rows(ids), adjacency.rows_from(len(users))) if ctx.few and ids is not None else None
        norms = users.new_empty(*users.shape[:2], 1)
        by_user = _Columns(users.new_zeros, len(users if ids is None else ids), items.shape[1])
        by_item = _Columns(users.new_zeros, *items.shape)
        for streams, columns in ctx.groups:
            x = _unit_rows(users, items, norms, streams, columns)
            if ids is None:
                y = sum_of_layers(adjacency, x, layers)
                parts = y[: len(users)], y[len(users) :]
            else:
                parts = _rows(adjacency, x, layers, ids, len(users), last)
            by_user.set(columns, parts[0])
            by_item.set(columns, parts[1])
        ctx.save_for_backward(users, norms, ids)
        found = by_user.table, by_item.table
        if shard:
            for table in found:
                shard.add_up(table)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_user: Tensor, by_item: Tensor) -> tuple[Tensor | None, ...]:
        users, norms, ids = ctx.saved_tensors
        first = ctx.adjacency.with_columns(_among(ids, len(users)), len(users)) if ctx.few else None
        if ctx.shard:
            # Copies: autograd may hand the same gradient to others.
            by_user, by_item = (grad.clone(memory_format=torch.contiguous_format) for grad in (by_user, by_item))
            for grad in (by_user, by_item):
                ctx.shard.add_up(grad)
        for_users = (torch.zeros_like if ctx.shard else torch.empty_like)(users)
        for_items = _Columns(by_item.new_zeros, *by_item.shape)
        for streams, columns in ctx.groups:
            grads = by_user[:, columns], by_item[:, columns]
            if ids is None:
                grad = sum_of_layers(ctx.adjacency, torch.cat(grads), ctx.layers)
            else:
                grad = _gradient_of_rows(ctx.adjacency, *grads, ctx.layers, ids, len(users), first)
            _unit_gradient(grad, users, norms, streams, out=for_users)
            for_items.set(columns, grad[len(users) :])
        return for_users, for_items.table, None, None, None, None, None


class _Columns:
    """A table that is set some columns at a time, 0 elsewhere; columns of the whole width are not copied."""

    def __init__(self, new: Callable[[int, int], Tensor], rows: int, width: int) -> None:
        self._new, self._shape = new, (rows, width)
        self._table: Tensor | None = None

    @property
    def table(self) -> Tensor:
        if self._table is None:
            self._table = self._new(*self._shape)
        return self._table

    def set(self, columns: slice, part: Tensor) -> None:
        if part.shape == self._shape:
            self._table = part
        else:
            self.table[:, columns] = part


def _groups(
    users: Tensor, items: Tensor, table_bytes: int | None, shard: ProcessShard | None
) -> Iterator[tuple[slice, slice]]:
    """Yield slices of this process's streams that are propagated at once, and of their columns."""
    count, width = users.shape[1:]
    most = table_bytes or (CPU_TABLE_BYTES if users.device.type == "cpu" else TABLE_BYTES)
    at_once = max(1, most // max((len(users) + len(items)) * width * users.element_size(), 1))
    own = range(count)[shard.pairs(count)] if shard else range(count)
    for first in own[::at_once]:
        last = min(first + at_once, own.stop)
        yield slice(first, last), slice(first * width, last * width)


def _chunks(users: Tensor) -> list[slice]:
    """Return slices of users: on the CPU their rows fit the cache."""
    size = 2048 if users.device.type == "cpu" else max(len(users), 1)
    return [slice(start, min(start + size, len(users))) for start in range(0, len(users), size)]


def _unit_rows(users: Tensor, items: Tensor, norms: Tensor, streams: slice, columns: slice) -> Tensor:
    """Return the rows of x in some columns, (U + I, d'); writes the norms of the users' streams."""
    x = items.new_empty(len(users) + len(items), columns.stop - columns.start)
    for chunk in _chunks(users):
        given, norm = users[chunk, streams], norms[chunk, streams]
        torch.linalg.vector_norm(given, dim=2, keepdim=True, out=norm)
        torch.div(given, norm.clamp_min_(_TINY), out=x[chunk].unflatten(1, given.shape[1:]))
    x[len(users) :] = items[:, columns]
    return x


def _unit_gradient(grad: Tensor, users: Tensor, norms: Tensor, streams: slice, out: Tensor) -> None:
    """Write (g - x <x, g>) / norm, the gradient in the users' streams, to their place in `out`."""
    for chunk in _chunks(users):
        given, norm = users[chunk, streams], norms[chunk, streams]
        x, g = given / norm, grad[chunk].unflatten(1, given.shape[1:])
        along = (x * g).sum(2, keepdim=True)
        torch.addcmul(g, x, along, value=-1, out=out[chunk, streams]).div_(norm)


def _among(ids: Tensor, n: int) -> Tensor:
    """Return (n,) bool, whether an index is among `ids`."""
    found = torch.zeros(n, dtype=torch.bool)
    found[ids] = True
    return found


def _rows(
    adjacency: SparseMatrix, x: Tensor, layers: int, ids: Tensor, n_users: int, last: tuple[Entries, Entries] | None
) -> tuple[Tensor, Tensor]:
    """Return rows of the sum over layers; `last` has the rows `ids` and those of the items, for the last product."""
    by_user, by_item, y = x[ids], x[n_users:].clone(), x
    for _ in range(layers - (last is not None)):
        y = adjacency.product(y)
        by_user += y[ids]
        by_item += y[n_users:]
    if last is not None:
        by_user += last[0].product(y)
        by_item += last[1].product(y)
    return by_user, by_item


def _gradient_of_rows(
    adjacency: SparseMatrix,
    by_user: Tensor,
    by_item: Tensor,
    layers: int,
    ids: Tensor,
    n_users: int,
    first: Entries | None,
) -> Tensor:
    """Return the gradient in x, given those of the rows; `first`, for the first product, has no columns of unread users."""
    grad = by_user.new_zeros(n_users + len(by_item), by_user.shape[1])
    for layer in range(layers + 1):
        if layer:
            grad = (first if layer == 1 and first is not None else adjacency).product(grad)
        grad[:n_users].index_add_(0, ids, by_user)
        grad[n_users:] += by_item
    return grad
