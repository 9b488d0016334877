"""Alignment and (calibrated) uniformity."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CPU_BLOCK = 256


def alignment(users: Tensor, items: Tensor) -> Tensor:
    """Mean squared distance of matching rows: mean_b ||u_b - i_b||^2 of (B, D) and (B, D)."""
    return (users - items).square().sum(-1).mean()


def uniformity(x: Tensor, t: float = 2.0, ids: Tensor | None = None) -> Tensor:
    """Log of the mean Gaussian potential over pairs: log mean_{a<b} exp(-t ||x_a - x_b||^2).

    Args:
        x: (B, D).
        t: inverse temperature.
        ids: (B,) integers; pairs of equal ids are left out. None: every pair counts.

    Returns:
        A scalar; 0 where no pair is left.
    """
    return _PairPotential.apply(x, None, ids, t)


def calibrated_uniformity(x: Tensor, similarity: Tensor, t: float = 2.0, ids: Tensor | None = None) -> Tensor:
    """Uniformity that repels similar items less: log mean_{a<b} exp(-t (||x_a - x_b||^2 - 2 + 2 s_ab)).

    Args:
        x: (B, D).
        similarity: (B, B), already clamped; the entries s_ab with a < b are read.
        t: inverse temperature.
        ids: (B,) integers; pairs of equal ids are left out. None: every pair counts.

    Returns:
        A scalar; 0 where no pair is left. Differentiable once, in x and in the similarity.
    """
    return _PairPotential.apply(x, similarity, ids, t)


class _PairPotential(torch.autograd.Function):
    """log mean exp of pair exponents q_ab = -t (||x_a - x_b||^2 [- 2 + 2 s_ab]), a < b, by row blocks.

    One matrix product per block of the upper triangle, and no list of pairs. With P = softmax of q over pairs,
    dq_ab / dx_a = -2 t (x_a - x_b) and dq_ab / ds_ab = -2 t.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, similarity: Tensor | None, ids: Tensor | None, t: float) -> Tensor:
        n = len(x)
        size = _CPU_BLOCK if x.device.type == "cpu" else max(n, 1)
        square = x.square().sum(1)
        weights, peaks, totals, counts = [], [], [], []
        for start in range(0, n, size):
            rows, columns = slice(start, start + size), slice(start, n)
            q = torch.addmm(square[columns], x[rows], x[columns].T, beta=-1, alpha=2).sub_(square[rows, None]).mul_(t)
            if similarity is not None:
                q.sub_(similarity[rows, columns], alpha=2 * t).add_(2 * t)
            left_out = _lower(q.shape[0], q.shape[1], x.device)
            if ids is not None:
                left_out = left_out | (ids[rows, None] == ids[columns])
            q.masked_fill_(left_out, -torch.inf)
            peak = q.max().clamp_min(torch.finfo(x.dtype).min)
            weight = q.sub_(peak).exp_()
            weights.append(weight)
            peaks.append(peak)
            totals.append(weight.sum())
            counts.append((~left_out).sum())
        if not weights:
            ctx.empty = True
            ctx.save_for_backward(x, similarity)
            return x.new_zeros(())
        peak, count = torch.stack(peaks), torch.stack(counts).sum()
        log_total = torch.logsumexp(torch.stack(totals).log() + peak, 0)
        ctx.empty, ctx.t = False, t
        ctx.save_for_backward(x, similarity, (peak - log_total).exp(), count, *weights)
        return torch.where(count > 0, log_total - count.to(x.dtype).log(), torch.zeros_like(log_total))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, similarity, *rest = ctx.saved_tensors
        grad_x = torch.zeros_like(x)
        grad_similarity = torch.zeros_like(similarity) if ctx.needs_input_grad[1] else None
        if not ctx.empty:
            share, count, *weights = rest
            scales = torch.where(count > 0, share, torch.zeros_like(share)) * (2 * ctx.t * grad)
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


def _lower(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril_()
