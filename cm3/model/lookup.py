"""Rows of a table, with a gradient that sums repeated rows in one order."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter, functional

FEW = 4
"""A leaf with at least this many rows for each one that is read gets its gradient row by row on the CPU."""


def lookup(table: Tensor, ids: Tensor) -> Tensor:
    """Return the rows `ids` (n,) of `table` (N, D), (n, D); repetitions are allowed.

    The gradient of a large leaf on the CPU is added to `table.grad` without a table of zeros for each of several losses
    that read few rows. Both ways give the same numbers.
    """
    few = table.device.type == "cpu" and FEW * len(ids) <= len(table)
    if few and table.requires_grad and table.is_leaf and not isinstance(table, Parameter):
        found: Tensor = _LeafRows.apply(table, ids)
        return found
    # Unlike indexing, this sums repeated rows in one order backward.
    return functional.embedding(ids, table)


class _LeafRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(ids)
        return table.index_select(0, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.table.grad is None:
            ctx.table.grad = torch.zeros_like(ctx.table)
        distinct, places = torch.unique(ids, return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(grad, places, len(distinct), -1, False)
        ctx.table.grad.index_add_(0, distinct, sums)
        return None, None
