"""The k largest entries of each row, with ties broken by position."""

import torch
from torch import Tensor

GROUP = 16
"""Columns whose maximum is taken together."""


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (indices, values), both (N, k), of the k largest entries of each row of (N, I) scores.

    Ordered by value, largest first; among equal values the lower index comes first and is kept first, which
    `torch.topk` alone does not guarantee. Waits for a GPU: see `top_k_and_ties`.

    Raises:
        ValueError: k is not in 1..I.
    """
    indices, values, tied = top_k_and_ties(scores, k)
    torn = torch.nonzero(tied).squeeze(1)
    if len(torn):
        # Keep all that is above the k-th value (a NaN is, to topk), and of its equals the first. Counting them is an
        # order of magnitude cheaper than sorting whole rows.
        again = scores[torn]
        least = values[torn, k - 1 :]
        above, level = ~(again <= least), again == least
        room = k - above.sum(dim=1, keepdim=True)
        kept = above | (level & (level.cumsum(dim=1, dtype=torch.int32) <= room))
        columns = torch.nonzero(kept)[:, 1].view(-1, k)
        values[torn], order = again.gather(1, columns).sort(dim=1, descending=True, stable=True)
        indices[torn] = columns.gather(1, order)
    return indices, values


def top_k_and_ties(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices and values as `top_k`, and (N,) bool: which of several equal entries came last is not settled.

    Never waits for a GPU. Other rows, nearly all of real scores, are final.

    Raises:
        ValueError: k is not in 1..I.
    """
    width = scores.shape[1]
    if not 0 < k <= width:
        raise ValueError(f"k = {k} is not between 1 and the {width} columns")
    if k == width:
        values, indices = torch.sort(scores, dim=1, descending=True, stable=True)
        return indices, values, torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    values, indices = largest(scores, k + 1)
    values, order = values.sort(dim=1, descending=True)
    indices = indices.gather(1, order)
    # A tie across the boundary: topk may have kept any of the equal entries.
    tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > -torch.inf)
    indices, by_index = indices[:, :k].sort(dim=1)
    values, by_value = values[:, :k].gather(1, by_index).sort(dim=1, descending=True, stable=True)
    return indices.gather(1, by_value), values, tied


def largest(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return (values, indices), both (N, width), of the largest entries of each row of (N, I) scores, in no order.

    They are in the `width` groups of columns with the largest maxima, as `width` maxima are above the entries of every
    other group. Maxima take one pass over memory; `torch.topk` over all columns takes as long as the matrix product
    before it. Which of equal entries are kept is not specified.
    """
    n_columns = scores.shape[1]
    n_groups = n_columns // GROUP
    if n_groups < 2 * width:
        values, places = scores.topk(width, dim=1, sorted=False)
        return values, places
    # Group i holds columns i, i + G, i + 2G, ..: neighbouring groups are adjacent in memory, and the maximum vectorises.
    whole = n_groups * GROUP
    maxima = scores[:, :whole].unflatten(1, (GROUP, n_groups)).amax(dim=1)
    groups = largest(maxima, width)[1]
    steps = torch.arange(0, whole, n_groups, device=scores.device)
    rest = torch.arange(whole, n_columns, device=scores.device).expand(len(scores), -1)
    members = torch.cat([(groups[:, :, None] + steps).flatten(1), rest], dim=1)
    values, places = scores.gather(1, members).topk(width, dim=1, sorted=False)
    return values, members.gather(1, places)
