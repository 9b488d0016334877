"""Uniformity and its gradient computed in blocks of pairs: the kernel that training runs.

Values are those of `cm3.model.losses`, without a (B, B) matrix, in one pass, and shared between processes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cm3.common.distributed import ProcessShard
from cm3.model.bfloat16_pairs import Bfloat16Pairs
from cm3.model.pair_blocks import lower_left_out, number_of_pairs, pair_blocks

CPU_BLOCK_ROWS = 256
"""Rows of a block on the CPU: its exponents stay in a core's cache."""

BLOCK_ENTRIES = 2**26
"""Pairs of a block on an accelerator, 256 MB in float32; a block has up to four such tables. A batch of 8,192 is one block."""


def tiled_uniformity(
    x: Tensor,
    t: float = 2.0,
    counts: Tensor | None = None,
    shard: ProcessShard | None = None,
    block_rows: int | None = None,
    bfloat16: bool = False,
) -> Tensor:
    """Return `cm3.model.losses.uniformity`. Differentiable once.

    Args:
        x, t, counts: as there.
        shard: of several processes; the value is that of all pairs, the gradient that of this process's pairs.
        block_rows: rows of a block; None: `CPU_BLOCK_ROWS`, or as many as `BLOCK_ENTRIES` holds on a GPU.
        bfloat16: compute products of pairs in bfloat16; the rows must be of unit norm.
    """
    kernel, size = _kernel(x, shard, block_rows, bfloat16)
    found: Tensor = kernel.apply(x, None, counts, t, None, shard, size)
    return found


def tiled_calibrated_uniformity(
    x: Tensor,
    points: Tensor,
    clamp: tuple[float, float],
    t: float = 2.0,
    counts: Tensor | None = None,
    shard: ProcessShard | None = None,
    block_rows: int | None = None,
    bfloat16: bool = False,
) -> Tensor:
    """Return `cm3.model.losses.calibrated_uniformity` with s_ab = clamp(<f_a, f_b>) of the points f, (B, d) unit rows.

    Differentiable once, in x and in the points.

    Args:
        x, t, counts: as there.
        points: (B, d).
        clamp: lower and upper limit of the similarity, whose gradient is 0 outside.
        shard, block_rows, bfloat16: as in `tiled_uniformity`.
    """
    kernel, size = _kernel(x, shard, block_rows, bfloat16)
    found: Tensor = kernel.apply(x, points, counts, t, clamp, shard, size)
    return found


def _kernel(
    x: Tensor, shard: ProcessShard | None, block_rows: int | None, bfloat16: bool
) -> tuple[type[torch.autograd.Function], int]:
    """Return what computes the pairs of the rows of `x`, and the rows of a block."""
    size = block_rows or default_block_rows(len(x), x.device.type, shard.size if shard else 1)
    return Bfloat16Pairs if bfloat16 else _PairPotential, size


class _PairPotential(torch.autograd.Function):
    """log mean exp of pair exponents q_ab = -t (||x_a - x_b||^2 [- 2 + 2 s_ab]), a < b, and its gradient, in one pass.

    One matrix product per block of the upper triangle, and no list of pairs. With P = softmax of q over pairs,
    dq_ab / dx_a = -2 t (x_a - x_b) and dq_ab / ds_ab = -2 t, so the gradients are sums over the same blocks of P, known
    up to the sum of all exp(q). They are accumulated relative to the largest q so far: no block is stored.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        points: Tensor | None,
        counts: Tensor | None,
        t: float,
        clamp: tuple[float, float] | None,
        shard: ProcessShard | None,
        block_rows: int,
    ) -> Tensor:
        n, wanted = len(x), ctx.needs_input_grad
        sums = _Sums(x, points if wanted[1] else None, wanted[0])
        offset = x.square().sum(1) * t
        if counts is not None:
            offset -= counts.to(x.dtype).log()
        left_out = lower_left_out(block_rows, x)
        for rows, columns in pair_blocks(n, block_rows, shard):
            above = offset[rows, None] if points is None else offset[rows, None] - 2 * t
            q = torch.addmm(offset[columns], x[rows], x[columns].T, beta=-1, alpha=2 * t).sub_(above)
            unclamped = None
            if points is not None and clamp is not None:
                cosine = points[rows] @ points[columns].T
                similarity = cosine.clamp(*clamp)
                q.sub_(similarity, alpha=2 * t)
                unclamped = torch.eq(cosine, similarity, out=cosine) if wanted[1] else None  # 1 or 0
            q[:, : len(q)].add_(left_out[: len(q), : len(q)])
            sums.add(q, rows, columns, unclamped)
        n_pairs = number_of_pairs(n, counts, x.device)
        if shard:
            sums.merge(shard)
        ctx.save_for_backward(*sums.gradients(torch.where(n_pairs > 0, t / sums.total, torch.zeros_like(sums.total))))
        value = sums.total.log() + sums.peak - n_pairs.to(x.dtype).log()
        return torch.where(n_pairs > 0, value, torch.zeros_like(value))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if part is None else part * grad for part in ctx.saved_tensors), None, None, None, None, None


def default_block_rows(n: int, device_type: str, processes: int = 1) -> int:
    """Return the rows of a block of the (n, n) pairs.

    One process on an accelerator takes all rows at once, to launch few kernels, as long as `BLOCK_ENTRIES` allows it.
    Several processes have four blocks each or more, as blocks of a triangle differ in size.
    """
    shares = 4 * processes if processes > 1 else 1
    most = CPU_BLOCK_ROWS if device_type == "cpu" else max(1, BLOCK_ENTRIES // max(n, 1))
    return min(-(-max(n, 1) // shares), most)


class _Sums:
    """Sums over pairs of exp(q_ab - peak): alone, and times what the gradients need; peak is the largest q so far."""

    def __init__(self, x: Tensor, points: Tensor | None, wanted: bool) -> None:
        self.x, self.points = x, points
        self.peak = x.new_full((), torch.finfo(x.dtype).min)
        self.total = x.new_zeros(())
        self.degree = x.new_zeros(len(x))
        self.pulls = torch.zeros_like(x) if wanted else None
        self.point_pulls = None if points is None else torch.zeros_like(points)

    def add(self, q: Tensor, rows: slice, columns: slice, unclamped: Tensor | None) -> None:
        """Add the pairs of a block, whose exponents `q` are overwritten."""
        self._raise(torch.maximum(self.peak, q.max()))
        weights = q.sub_(self.peak).exp_()
        by_row = weights.sum(1)
        self.total += by_row.sum()
        if self.pulls is not None:
            self.degree[rows] += by_row
            self.degree[columns] += weights.sum(0)
            self.pulls[rows].addmm_(weights, self.x[columns])
            self.pulls[columns].addmm_(weights.T, self.x[rows])
        if self.points is not None and self.point_pulls is not None and unclamped is not None:
            weights.mul_(unclamped)
            self.point_pulls[rows].addmm_(weights, self.points[columns])
            self.point_pulls[columns].addmm_(weights.T, self.points[rows])

    def _raise(self, peak: Tensor) -> None:
        shrink = (self.peak - peak).exp()
        for part in (self.total, self.degree, self.pulls, self.point_pulls):
            if part is not None and (part.device.type != "cpu" or shrink != 1):
                part.mul_(shrink)
        self.peak = peak

    def merge(self, shard: ProcessShard) -> None:
        """Make the total that of all processes' pairs; what the gradients need stays that of this one's."""
        peak, total = shard.merge(self.peak, self.total)
        self._raise(peak)
        self.total = total

    def gradients(self, scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return those in x and in the points, given t over the sum of all exp(q - peak)."""
        scale = 2 * scale
        by_x = None if self.pulls is None else self.pulls.addcmul_(self.degree[:, None], self.x, value=-1).mul_(scale)
        by_points = None if self.point_pulls is None else self.point_pulls.mul_(-scale)
        return by_x, by_points
