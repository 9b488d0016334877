"""Alignment and (calibrated) uniformity."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CPU_BLOCK = 256


def alignment(users: Tensor, items: Tensor) -> Tensor:
    """Mean squared distance of matching rows: mean_b ||u_b - i_b||^2 of (B, D) and (B, D)."""
    return (users - items).square().sum(-1).mean()


def uniformity(x: Tensor, t: float = 2.0, counts: Tensor | None = None) -> Tensor:
    """Log of the mean Gaussian potential over pairs: log mean_{a<b} exp(-t ||x_a - x_b||^2).

    Args:
        x: (B, D).
        t: inverse temperature.
        counts: (B,) integers, how often each row stands for itself: a pair then weighs n_a n_b, which is what
            repeated rows give once the pairs of a row with its own repetitions are left out. None: all 1.

    Returns:
        A scalar; 0 where there is no pair. Differentiable once.
    """
    return _PairPotential.apply(x, None, counts, t)


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
    return _PairPotential.apply(x, similarity, counts, t)


class _PairPotential(torch.autograd.Function):
    """log mean exp of pair exponents q_ab = -t (||x_a - x_b||^2 [- 2 + 2 s_ab]), a < b, by row blocks.

    One matrix product per block of the upper triangle, and no list of pairs. With P = softmax of q over pairs,
    dq_ab / dx_a = -2 t (x_a - x_b) and dq_ab / ds_ab = -2 t.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, similarity: Tensor | None, counts: Tensor | None, t: float) -> Tensor:
        n = len(x)
        ctx.t = t
        n_pairs = n * (n - 1) // 2 if counts is None else (counts.sum().square() - counts.square().sum()) // 2
        n_pairs = torch.as_tensor(n_pairs, device=x.device)
        size = _CPU_BLOCK if x.device.type == "cpu" else max(n, 1)
        offset = x.square().sum(1) * t
        if counts is not None:
            offset -= counts.to(x.dtype).log()
        weights, peaks, totals = [], [x.new_full((), -torch.inf)], [x.new_ones(())]
        for start in range(0, n, size):
            rows, columns = slice(start, start + size), slice(start, n)
            q = torch.addmm(offset[columns], x[rows], x[columns].T, beta=-1, alpha=2 * t).sub_(offset[rows, None])
            if similarity is not None:
                q.sub_(similarity[rows, columns], alpha=2 * t).add_(2 * t)
            corner = q[:, : len(q)]
            corner.masked_fill_(torch.ones_like(corner, dtype=torch.bool).tril_(), -torch.inf)
            peaks.append(q.max().clamp_min(torch.finfo(x.dtype).min))
            weights.append(q.sub_(peaks[-1]).exp_())
            totals.append(weights[-1].sum())
        peak = torch.stack(peaks)
        log_total = torch.logsumexp(torch.stack(totals).log() + peak, 0)
        ctx.save_for_backward(x, similarity, (peak[1:] - log_total).exp(), n_pairs, *weights)
        return torch.where(n_pairs > 0, log_total - n_pairs.to(x.dtype).log(), torch.zeros_like(log_total))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, similarity, share, n_pairs, *weights = ctx.saved_tensors
        grad_x = torch.zeros_like(x)
        grad_similarity = torch.zeros_like(similarity) if ctx.needs_input_grad[1] else None
        scales = torch.where(n_pairs > 0, share, torch.zeros_like(share)) * (2 * ctx.t * grad)
        start = 0
        for weight, scale in zip(weights, scales, strict=True):
            rows, columns = slice(start, start + len(weight)), slice(start, len(x))
            start += len(weight)
            scaled_rows, scaled_columns = x[rows] * scale, x[columns] * scale
            grad_x[rows].addmm_(weight, scaled_columns)
            grad_x[columns].addmm_(weight.T, scaled_rows)
            grad_x[rows].addcmul_(weight.sum(1)[:, None], scaled_rows, value=-1)
            grad_x[columns].addcmul_(weight.sum(0)[:, None], scaled_columns, value=-1)
            if grad_similarity is not None:
                torch.mul(weight, -scale, out=grad_similarity[rows, columns])
        return grad_x, grad_similarity, None, None
