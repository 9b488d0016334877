"""Uniformity and its gradient by bfloat16 products, for rows of unit norm: `training.precision: bfloat16`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cm3.common.distributed import ProcessShard
from cm3.model.pair_blocks import lower_left_out, number_of_pairs, pair_blocks

ROW_MULTIPLE = 64
"""Rows and blocks are padded to a multiple of this: the CPU's library compiles a product of each new shape, which takes longer
than to compute it."""


class Bfloat16Pairs(torch.autograd.Function):
    """log mean exp of the pair exponents q_ab = 2 t (<x_a, x_b> - 1 [+ 1 - s_ab]), a < b, and its gradient, in one pass.

    These are the exponents of `cm3.model.pair_potential` for rows of unit norm. They lie between -4 t and 4 t, so that no
    largest one has to be subtracted, and a row that counts c times is c times its row in one factor of a product. A block of
    exp(2 t (<x_a, x_b> - s_ab)) is bfloat16 from its first product to its last, and sums over blocks are float32.
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
        given, wanted = len(x), ctx.needs_input_grad
        weights = _padded(x.new_ones(given) if counts is None else counts.to(x.dtype))
        x, points = _padded(x), None if points is None else _padded(points)
        rows_by, columns_by = (2 * t * x).bfloat16(), x.bfloat16()
        sums = _WeightedSums(columns_by, weights)
        point_sums = None if points is None or not wanted[1] else _WeightedSums(points.bfloat16(), weights)
        points_by = None if points is None else ((2 * t * points).bfloat16(), points.bfloat16())
        block_rows += -block_rows % ROW_MULTIPLE
        left_out = lower_left_out(block_rows, columns_by)
        for rows, columns in pair_blocks(len(x), block_rows, shard):
            q = rows_by[rows] @ columns_by[columns].T
            unclamped = None
            if points_by is not None and clamp is not None:
                cosine = points_by[0][rows] @ points_by[1][columns].T
                similarity = cosine.clamp(2 * t * clamp[0], 2 * t * clamp[1])
                q -= similarity
                if point_sums:
                    # As integers, all bits set or none; faster than bool.
                    bits = cosine.view(torch.int16)
                    unclamped = torch.eq(bits, similarity.view(torch.int16), out=bits).neg_()
            q[:, : len(q)].add_(left_out[: len(q), : len(q)])
            q.exp_()
            sums.add(q, rows, columns)
            if point_sums and unclamped is not None:
                q.view(torch.int16).bitwise_and_(unclamped)
                point_sums.add(q, rows, columns)
        total = sums.total()
        if shard:
            total = shard.sum(total)
        n_pairs = number_of_pairs(given, counts, x.device)
        scale = torch.where(n_pairs > 0, 2 * t / total, torch.zeros_like(total))
        by_x = sums.differences()[:given].mul_(scale) if wanted[0] else None
        by_points = None if point_sums is None else point_sums.pulls()[:given].mul_(-scale)
        ctx.save_for_backward(by_x, by_points)
        value = total.log() - n_pairs.to(total.dtype).log() - (2 * t if points is None else 0)
        return torch.where(n_pairs > 0, value, torch.zeros_like(value))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if part is None else part * grad for part in ctx.saved_tensors), *(None,) * 5


def _padded(rows: Tensor) -> Tensor:
    """Return the rows and zeros below them; a row whose count is 0 adds nothing."""
    return torch.cat([rows, rows.new_zeros(-len(rows) % ROW_MULTIPLE, *rows.shape[1:])])


class _WeightedSums:
    """Sums over pairs a < b of w_ab c_b z_b in row a and w_ab c_a z_a in row b, for blocks of weights w, rows z and counts c."""

    def __init__(self, z: Tensor, counts: Tensor) -> None:
        self.z, self.counts = z, counts
        # The sums of w_ab c_b alone come from the same products; a multiple of eight columns suits a GPU.
        ones = z.new_ones(len(z), 1)
        padding = z.new_zeros(len(z), -(z.shape[1] + 1) % 8)
        self.factor = (torch.cat([z, ones, padding], 1) * counts[:, None]).bfloat16()
        self.sums = counts.new_zeros(self.factor.shape)

    def add(self, weights: Tensor, rows: slice, columns: slice) -> None:
        """Add the pairs of a block."""
        self.sums[rows] += weights @ self.factor[columns]
        self.sums[columns] += weights.T @ self.factor[rows]

    def total(self) -> Tensor:
        """Return the sum of w_ab c_a c_b over the pairs."""
        return (self.sums[:, self.z.shape[1]] * self.counts).sum() / 2

    def pulls(self) -> Tensor:
        """Return c_a times the sum over b of w_ab c_b z_b, (n, d)."""
        return self.sums[:, : self.z.shape[1]] * self.counts[:, None]

    def differences(self) -> Tensor:
        """Return c_a times the sum over b of w_ab c_b (z_b - z_a), (n, d)."""
        return self.pulls().addcmul_((self.sums[:, self.z.shape[1]] * self.counts)[:, None], self.z.float(), value=-1)
