"""The two graphs of CM3, user-item and item-item, and sparse products with them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cm3.common.arrays import blocks
from cm3.similarity.exact import knn

__all__ = [
    "SparseMatrix",
    "add_neighbours",
    "item_item_matrix",
    "knn",
    "propagate",
    "user_item_matrix",
]


class SparseMatrix(nn.Module):
    """A constant (N, K) float32 matrix in CSR format, as buffers that move between devices with the module."""

    offsets: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, matrix: sp.csr_matrix) -> None:
        super().__init__()
        # A copy: sorting in place would reorder the index array of the caller's matrix, but not its values.
        matrix = sp.csr_matrix(matrix, dtype=np.float32, copy=True)
        matrix.sum_duplicates()
        self.shape = matrix.shape
        index = np.int32 if max(matrix.nnz, *matrix.shape) < 2**31 else np.int64
        self.register_buffer("offsets", torch.from_numpy(matrix.indptr.astype(index)), persistent=False)
        self.register_buffer("columns", torch.from_numpy(matrix.indices.astype(index)), persistent=False)
        self.register_buffer("values", torch.from_numpy(matrix.data.copy()), persistent=False)
        self._csr: dict[torch.dtype, Tensor] = {}
        self._sides: dict[int, tuple[Entries, Entries]] = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # The buffers move to another device or type: the matrices made of them are out of date.
        self._csr, self._sides = {}, {}
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def product(self, x: Tensor) -> Tensor:
        """Return the dense (N, D) product with `x` (K, D), outside autograd."""
        if x.device.type == "cpu":
            return Entries(self.offsets, self.columns, self.values).product(x)
        if x.device.type == "cuda":
            return self.csr_product(x)
        lengths = (self.offsets[1:] - self.offsets[:-1]).long()
        rows = torch.arange(self.shape[0], device=x.device).repeat_interleave(lengths, output_size=len(self.columns))
        weighted = x.index_select(0, self.columns) * self.values.to(x.dtype)[:, None]
        return x.new_zeros((self.shape[0], x.shape[1])).index_add_(0, rows, weighted)

    def sides(self, first: int) -> "tuple[Entries, Entries]":
        """Return the rows before `first` and those from there on, as matrices of the columns that they have entries in.

        Of a user-item graph, whose users are its first rows: the users' rows over the items, and the items' over the users.
        On the CPU; both are kept.
        """
        if first not in self._sides:
            start = int(self.offsets[first])
            before = Entries(self.offsets[: first + 1], self.columns[:start] - first, self.values[:start])
            after = Entries(self.offsets[first:] - start, self.columns[start:], self.values[start:])
            self._sides[first] = before, after
        return self._sides[first]

    def csr_product(self, x: Tensor) -> Tensor:
        """Return the product with `x` (K, D) through torch's sparse kernel, the fastest one on a CUDA GPU."""
        if x.dtype not in self._csr:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                values = self.values.to(x.dtype)
                self._csr[x.dtype] = torch.sparse_csr_tensor(
                    self.offsets, self.columns, values, self.shape, check_invariants=False
                )
        product: Tensor = self._csr[x.dtype] @ x
        return product


@dataclass(frozen=True)
class Entries:
    """Entries of a (N, K) matrix in CSR format on the CPU."""

    offsets: Tensor
    columns: Tensor
    values: Tensor

    def product(self, x: Tensor) -> Tensor:
        """Return the dense (N, D) product with `x` (K, D), outside autograd.

        An embedding bag sums the weighted rows; its kernel is several times faster than torch's sparse product. Each
        row is summed in a fixed order, so the result is deterministic.
        """
        if not len(self.columns):
            return x.new_zeros((len(self.offsets) - 1, x.shape[1]))
        values, columns = self.values.to(x.dtype), self.columns
        step, wider = rows_of_width(x)
        if step > 1 and step * len(x) < 2**31:
            columns, x = columns * step, wider  # a bag would make a copy otherwise
        return functional.embedding_bag(
            columns, x, self.offsets, mode="sum", per_sample_weights=values, include_last_offset=True
        )

    def product_into(self, out: Tensor, x: Tensor) -> Tensor:
        """Write the product to `out` (N, D) and return it; some rows at a time, which the cache holds."""
        for rows in blocks(len(out)):
            offsets = self.offsets[rows.start : rows.stop + 1]
            here = slice(int(offsets[0]), int(offsets[-1]))
            out[rows] = Entries(offsets - here.start, self.columns[here], self.values[here]).product(x)
        return out

    def rows(self, ids: Tensor) -> "Entries":
        """Return the rows `ids` (n,), repetitions allowed, as a matrix of n rows."""
        starts, ends = self.offsets[ids].long(), self.offsets[ids + 1].long()
        offsets = functional.pad((ends - starts).cumsum(0), (1, 0))
        total = int(offsets[-1])
        places = torch.arange(total) + (starts - offsets[:-1]).repeat_interleave(ends - starts, output_size=total)
        columns, values = (some.index_select(0, places) for some in (self.columns, self.values))
        return Entries(offsets.to(self.offsets.dtype), columns, values)

    def with_columns(self, kept: Tensor) -> "Entries":
        """Return the matrix with 0 in the columns where `kept` (K,) bool is false."""
        wanted = kept.index_select(0, self.columns)
        before = torch.zeros(len(wanted) + 1, dtype=self.offsets.dtype)
        torch.cumsum(wanted, 0, out=before[1:])
        places = wanted.nonzero().squeeze(1)
        return Entries(before[self.offsets], self.columns[places], self.values[places])


def rows_of_width(x: Tensor) -> tuple[int, Tensor]:
    """Return (s, y) for some columns `x` (N, D) of a wider table: row n of `x` is row s n of y, the memory as rows of D.

    Where the table's width is no multiple of D, or `x` is the table, that is (1, x).
    """
    n, width = x.shape
    step = x.stride(0) // max(width, 1)
    if step < 2 or not n or x.stride() != (step * width, 1):
        return 1, x
    return step, x.as_strided((step * (n - 1) + 1, width), (width, 1))


def add_rows(x: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """Add `rows` (n, D) to the rows `ids` (n,) of `x` (N, D) in place, repeated ones in their order, and return `x`.

    Torch adds to some columns of a wider table row by row with one thread, four times slower than to rows that are adjacent.
    """
    step, wider = rows_of_width(x)
    for part in blocks(len(ids)):
        wider.index_add_(0, ids[part] * step, rows[part].contiguous())
    return x


def user_item_matrix(interactions: sp.csr_matrix) -> sp.csr_matrix:
    """Return the symmetric-normalised bipartite adjacency A, (U + I, U + I), of (U, I) interactions.

    A_ui = A_iu = 1 / sqrt(deg(u) deg(i)) for each distinct pair; nodes without an edge have empty rows.
    """
    pairs = sp.csr_matrix((np.ones(interactions.nnz), interactions.indices, interactions.indptr), interactions.shape)
    pairs.sum_duplicates()
    pairs.data[:] = 1.0
    users, items = (1 / np.sqrt(np.maximum(np.asarray(pairs.sum(axis)).ravel(), 1)) for axis in (1, 0))
    scaled = sp.csr_matrix(sp.diags_array(users) @ pairs @ sp.diags_array(items))
    return sp.csr_matrix(sp.block_array([[None, scaled], [scaled.T, None]]))


def item_item_matrix(
    neighbours: Sequence[tuple[np.ndarray, np.ndarray]], weights: Sequence[float], n_items: int
) -> sp.csr_matrix:
    """Return S = sum_m w_m S_m, (I, I): S_m holds 1 / k at each of an item's k neighbours.

    Args:
        neighbours: per modality, item and neighbour indices of equal length. An item without rows has no vector
            in that modality; the weights of its other modalities are then scaled to sum 1.
        weights: w_m per modality.
        n_items: I.
    """
    total = sp.csr_matrix((n_items, n_items))
    present = np.zeros(n_items)
    for (items, others), weight in zip(neighbours, weights, strict=True):
        count = np.bincount(items, minlength=n_items)
        ones = sp.csr_matrix((1.0 / count[items], (items, others)), (n_items, n_items))
        total = total + weight * ones
        present += weight * (count > 0)
    scale = np.divide(1.0, present, out=np.zeros(n_items), where=present > 0)
    result = sp.csr_matrix(sp.diags_array(scale) @ total)
    result.eliminate_zeros()
    return result


def propagate(adjacency: SparseMatrix, x: Tensor, layers: int) -> Tensor:
    """Return sum_{l=0..layers} A^l x for a symmetric A (N, N) and x (N, D).

    By Horner's rule. A is symmetric, so the gradient is the same sum over the incoming gradient; no layer is stored.
    """
    found: Tensor = _Propagation.apply(x, adjacency, layers)
    return found


class _Propagation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, adjacency: SparseMatrix, layers: int) -> Tensor:
        ctx.adjacency, ctx.layers = adjacency, layers
        return sum_of_layers(adjacency, x, layers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_of_layers(ctx.adjacency, grad.contiguous(), ctx.layers), None, None


def sum_of_layers(adjacency: SparseMatrix, x: Tensor, layers: int) -> Tensor:
    """Return `propagate`, outside autograd."""
    y = x.clone() if layers == 0 else x
    for _ in range(layers):
        y = adjacency.product(y).add_(x)
    return y


def add_neighbours(matrix: SparseMatrix, transposed: SparseMatrix, x: Tensor, layers: int) -> Tensor:
    """Return x + S^layers x of S (N, N) and x (N, D); the gradient uses the transpose of S."""
    found: Tensor = _Neighbours.apply(x, matrix, transposed, layers)
    return found


class _Neighbours(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: SparseMatrix, transposed: SparseMatrix, layers: int) -> Tensor:
        ctx.transposed, ctx.layers = transposed, layers
        return _power(matrix, x, layers) + x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _power(ctx.transposed, grad.contiguous(), ctx.layers) + grad, None, None, None


def _power(matrix: SparseMatrix, x: Tensor, layers: int) -> Tensor:
    for _ in range(layers):
        x = matrix.product(x)
    return x
