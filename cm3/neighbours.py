"""Exact nearest neighbours by cosine, in blocks."""

import torch
from torch import Tensor
from torch.nn import functional

from cm3.topk import top_k

_BLOCK_ENTRIES = 8_000_000
_MARGIN = 16
# Bound on the error of a float32 cosine, far above what a blocked product of some thousand terms shows.
_SLACK = 2e-5


def knn(features: Tensor, k: int, include_self: bool = True) -> tuple[Tensor, Tensor]:
    """Return the k nearest rows of each row by cosine, (indices (N, k) int64, scores (N, k)).

    Candidates come from blocked products in float32 and are scored again in float64, so the scores are correctly
    rounded and do not depend on the block size or the device; equal scores are ordered by lower index. A row of
    zeros has cosine 0 with everything. Never holds an N x N matrix.

    Args:
        features: (N, d), float32 or float64; the scores have the same type.
        k: neighbours per row.
        include_self: whether a row may be its own neighbour.

    Raises:
        ValueError: fewer than k rows to choose from, or a value that is not finite.
    """
    x = torch.as_tensor(features)
    x = x if x.dtype == torch.float64 else x.float()
    n = len(x)
    if not 0 < k <= n - (not include_self):
        raise ValueError(f"k = {k} neighbours of {n} rows{'' if include_self else ' without the row itself'}")
    if not torch.isfinite(x).all():
        raise ValueError("the features hold NaN or infinity")
    exact = functional.normalize(x.double(), dim=1)
    coarse = exact.float()
    block = max(1, min(n, _BLOCK_ENTRIES // n))
    indices = torch.empty((n, k), dtype=torch.int64, device=x.device)
    scores = torch.empty((n, k), dtype=x.dtype, device=x.device)
    for start in range(0, n, block):
        rows = torch.arange(start, min(start + block, n), device=x.device)
        indices[rows], scores[rows] = _nearest(exact, coarse, rows, k, include_self, x.dtype)
    return indices, scores


def _nearest(
    exact: Tensor, coarse: Tensor, rows: Tensor, k: int, include_self: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    similarity = coarse[rows] @ coarse.T
    if not include_self:
        similarity[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
    width = min(len(coarse), k + _MARGIN)
    bounds, candidates = similarity.topk(width, dim=1)
    candidates = candidates.sort(dim=1).values
    found = _settle(_products(exact, rows, candidates), dtype)
    if not include_self:
        found[candidates == rows[:, None]] = -torch.inf
    place, scores = top_k(found, k)
    indices = candidates.gather(1, place)
    if width < len(coarse):
        # Where the worst candidate is as good as the k-th neighbour, a row outside the candidates may tie with it.
        unsure = torch.nonzero(bounds[:, -1] >= scores[:, -1] - _SLACK).squeeze(1)
        for part in unsure.split(max(1, _BLOCK_ENTRIES // (4 * len(exact)))):
            whole = _settle(exact[rows[part]] @ exact.T, dtype)
            if not include_self:
                whole[torch.arange(len(part), device=rows.device), rows[part]] = -torch.inf
            indices[part], scores[part] = top_k(whole, k)
    return indices, scores


def _products(exact: Tensor, rows: Tensor, candidates: Tensor) -> Tensor:
    size = max(1, _BLOCK_ENTRIES // (candidates.shape[1] * exact.shape[1]))
    parts = zip(rows.split(size), candidates.split(size), strict=True)
    return torch.cat([torch.einsum("nd,nwd->nw", exact[some], exact[others]) for some, others in parts])


def _settle(scores: Tensor, dtype: torch.dtype) -> Tensor:
    # Equal vectors must score equally although a product sums them in another order: round that noise away.
    if dtype == torch.float64:
        return (scores * 2.0**44).round() * 2.0**-44
    return scores.to(dtype)
