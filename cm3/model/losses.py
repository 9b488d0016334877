"""The losses of CM3 as formulas: alignment, uniformity and calibrated uniformity.

Training computes the same values a block of pairs at a time (`cm3.model.pair_potential`).
"""

import torch
from torch import Tensor


def alignment(users: Tensor, items: Tensor) -> Tensor:
    """Mean squared distance of matching rows: mean_b ||u_b - i_b||^2 of (B, D) and (B, D)."""
    return (users - items).square().sum(-1).mean()


def uniformity(x: Tensor, t: float = 2.0, counts: Tensor | None = None) -> Tensor:
    """Log of the mean Gaussian potential over pairs: log mean_{a<b} exp(-t ||x_a - x_b||^2).

    Wang and Isola, Understanding contrastive representation learning, ICML 2020. Needs memory for (B, B).

    Args:
        x: (B, D).
        t: inverse temperature.
        counts: (B,) integers, how often each row occurs in the batch: a pair then weighs n_a n_b, as repeated rows
            would without the pairs of a row with its own repetitions. None: all 1.

    Returns:
        A scalar; 0 where there is no pair.
    """
    return _log_mean_exp(-t * _squared_distances(x), counts)


def calibrated_uniformity(x: Tensor, similarity: Tensor, t: float = 2.0, counts: Tensor | None = None) -> Tensor:
    """Uniformity that repels similar items less: log mean_{a<b} exp(-t (||x_a - x_b||^2 - 2 + 2 s_ab)).

    Args:
        x: (B, D).
        similarity: (B, B), already clamped; the entries s_ab with a < b are read.
        t: inverse temperature.
        counts: as in `uniformity`.

    Returns:
        A scalar; 0 where there is no pair.
    """
    return _log_mean_exp(-t * (_squared_distances(x) - 2 + 2 * similarity), counts)


def _squared_distances(x: Tensor) -> Tensor:
    squares = x.square().sum(1)
    return squares[:, None] + squares - 2 * x @ x.T


def _log_mean_exp(exponents: Tensor, counts: Tensor | None) -> Tensor:
    """Return log(sum_{a<b} n_a n_b exp(q_ab) / sum_{a<b} n_a n_b) of (B, B) exponents, or 0 without a pair."""
    n = exponents.new_ones(len(exponents)) if counts is None else counts.to(exponents.dtype)
    pairs = torch.outer(n, n).triu(1)
    if not pairs.any():
        return 0 * exponents.sum()
    return (exponents + pairs.log()).logsumexp((0, 1)) - pairs.sum().log()
