"""Alignment and (calibrated) uniformity."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cm3.common.distributed import Share

_CPU_BLOCK = 256  # rows; the tile of a block stays in a core's cache


def alignment(users: Tensor, items: Tensor) -> Tensor:
    """Mean squared distance of matching rows: mean_b ||u_b - i_b||^2 of (B, D) and (B, D)."""
    return (users - items).square().sum(-1).mean()


def uniformity(x: Tensor, t: float = 2.0, counts: Tensor | None = None, share: Share | None = None) -> Tensor:
    """Log of the mean Gaussian potential over pairs: log mean_{a<b} exp(-t ||x_a - x_b||^2).

    Args:
        x: (B, D).
        t: inverse temperature.
        counts: (B,) integers, how often each row stands for itself: a pair then weighs n_a n_b, which is what
            repeated rows give once the pairs of a row with its own repetitions are left out. None: all 1.
        share: of several processes; the value is that of all pairs, the gradient of this process's alone.

    Returns:
        A scalar; 0 where there is no pair. Differentiable once.
    """
    return _PairPotential.apply(x, None, None, counts, t, None, share)


def calibrated_uniformity(x: Tensor, similarity: Tensor, t: float = 2.0, counts: Tensor | None = None) -> Tensor:
    """Uniformity that repels similar items less: log mean_{a<b} exp(-t (||x_a - x_b||^2 - 2 + 2 s_ab)).

    Args:
        x: (B, D).
        similarity: (B, B), already clamped; the entries s_ab with a < b are read.
        t: inverse temperature.
        counts: as in `uniformity`.

    Returns:
        A scalar; 0 where there is no pair. Differentiable once, in x and in the similarity.
    """
    return _PairPotential.apply(x, similarity, None, counts, t, None, None)


def calibrated_by(
    x: Tensor,
    points: Tensor,
    clamp: tuple[float, float],
    t: float = 2.0,
    counts: Tensor | None = None,
    share: Share | None = None,
) -> Tensor:
    """Return `calibrated_uniformity` with s_ab = clamp(<f_a, f_b>) of the points f, (B, d) unit rows.

    The similarity exists a block of rows at a time. Differentiable once, in x and in the points. `share` as in
    `uniformity`.
    """
    return _PairPotential.apply(x, None, points, counts, t, clamp, share)


class _PairPotential(torch.autograd.Function):
    """log mean exp of pair exponents q_ab = -t (||x_a - x_b||^2 [- 2 + 2 s_ab]), a < b, and its gradient, in one pass.

    One matrix product per block of the upper triangle, and no list of pairs. With P = softmax of q over pairs,
    dq_ab / dx_a = -2 t (x_a - x_b) and dq_ab / ds_ab = -2 t, so the gradients are sums over the same blocks of P, known
    up to the sum of all exp(q). They are gathered on the way, relative to the largest q so far: no block is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        similarity: Tensor | None,
        points: Tensor | None,
        counts: Tensor | None,
        t: float,
        clamp: tuple[float, float] | None,
        share: Share | None,
    ) -> Tensor:
        n, wanted = len(x), ctx.needs_input_grad
        sums = _Sums(x, similarity if wanted[1] else None, points if wanted[2] else None, wanted[0])
        offset = x.square().sum(1) * t
        if counts is not None:
            offset -= counts.to(x.dtype).log()
        calibrated = similarity is not None or points is not None
        size = -(-max(n, 1) // (4 * share.size if share else 1))
        size = min(size, _CPU_BLOCK) if x.device.type == "cpu" else size
        for block, start in enumerate(range(0, n, size)):
            if share and not share.owns(block):
                continue
            rows, columns = slice(start, start + size), slice(start, n)
            above = offset[rows, None] - 2 * t if calibrated else offset[rows, None]
            q = torch.addmm(offset[columns], x[rows], x[columns].T, beta=-1, alpha=2 * t).sub_(above)
            clamped = None
            if similarity is not None:
                q.sub_(similarity[rows, columns], alpha=2 * t)
            elif points is not None and clamp is not None:
                cosine = points[rows] @ points[columns].T
                s = cosine.clamp(*clamp)
                clamped = cosine != s if wanted[2] else None
                q.sub_(s, alpha=2 * t)
            corner = q[:, : len(q)]
            corner.masked_fill_(torch.ones_like(corner, dtype=torch.bool).tril_(), -torch.inf)
            sums.add(q, rows, columns, clamped)
        n_pairs = n * (n - 1) // 2 if counts is None else (counts.sum().square() - counts.square().sum()) // 2
        n_pairs = torch.as_tensor(n_pairs, device=x.device)
        if share:
            sums.merge(share)
        ctx.save_for_backward(*sums.gradients(torch.where(n_pairs > 0, t / sums.total, torch.zeros_like(sums.total))))
        value = sums.total.log() + sums.peak - n_pairs.to(x.dtype).log()
        return torch.where(n_pairs > 0, value, torch.zeros_like(value))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if part is None else part * grad for part in ctx.saved_tensors), None, None, None, None


class _Sums:
    """Sums over pairs of exp(q_ab - peak): alone, and times what the gradients need; peak is the largest q so far."""

    def __init__(self, x: Tensor, similarity: Tensor | None, points: Tensor | None, wanted: bool) -> None:
        self.x, self.points = x, points
        self.peak = x.new_full((), torch.finfo(x.dtype).min)
        self.total = x.new_zeros(())
        self.degree = x.new_zeros(len(x))
        self.pulls = torch.zeros_like(x) if wanted else None
        self.similarity = None if similarity is None else torch.zeros_like(similarity)
        self.point_pulls = None if points is None else torch.zeros_like(points)

    def add(self, q: Tensor, rows: slice, columns: slice, clamped: Tensor | None) -> None:
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
        if self.similarity is not None:
            self.similarity[rows, columns] = weights
        if self.points is not None and self.point_pulls is not None and clamped is not None:
            weights.masked_fill_(clamped, 0)
            self.point_pulls[rows].addmm_(weights, self.points[columns])
            self.point_pulls[columns].addmm_(weights.T, self.points[rows])

    def _raise(self, peak: Tensor) -> None:
        shrink = (self.peak - peak).exp()
        for part in (self.total, self.degree, self.pulls, self.similarity, self.point_pulls):
            if part is not None and (part.device.type != "cpu" or shrink != 1):
                part.mul_(shrink)
        self.peak = peak

    def merge(self, share: Share) -> None:
        """Make the total that of all processes' pairs; what the gradients need stays that of this one's."""
        peak, total = share.merge(self.peak, self.total)
        self._raise(peak)
        self.total = total

    def gradients(self, scale: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return those in x, the similarity and the points, given t over the sum of all exp(q - peak)."""
        scale = 2 * scale
        by_x = None if self.pulls is None else self.pulls.addcmul_(self.degree[:, None], self.x, value=-1).mul_(scale)
        by_similarity = None if self.similarity is None else self.similarity.mul_(-scale)
        by_points = None if self.point_pulls is None else self.point_pulls.mul_(-scale)
        return by_x, by_similarity, by_points
