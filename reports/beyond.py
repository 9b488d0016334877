"""What lists are like beside their hits: coverage of the catalogue, popularity, novelty, concentration."""

from collections.abc import Sequence

import numpy as np


def beyond_accuracy(lists: np.ndarray, counts: np.ndarray, n_users: int, cutoffs: Sequence[int]) -> dict[str, float]:
    """Return coverage@k, popularity@k, novelty@k and gini@k of the first k recommendations.

    coverage: distinct items recommended to anyone / items. popularity: mean number of training interactions of a
    recommended item. novelty: mean self-information -log2(c_i / U) of a recommended item, bought c_i times by U
    users; a cold item counts as bought once. gini: sum_i (2 i - I - 1) n_(i) / (I sum n), n_(1) <= ... <= n_(I) being
    how often each item is recommended: 0 if all equally often, (I - 1) / I if one item alone. Popularity and novelty
    are averaged over each user's list first, then over the users that have one.

    Args:
        lists: (R, K) item indices, -1 where a list ends.
        counts: (I,) training interactions of each item.
        n_users: U, users with training interactions.
        cutoffs: k; those above K are left out.

    Source: Zhou et al., Solving the apparent diversity-accuracy dilemma (2010) for novelty.
    """
    information = np.log2(n_users) - np.log2(np.maximum(counts, 1))
    result = {}
    for k in cutoffs:
        if k > lists.shape[1]:
            continue
        part = lists[:, :k]
        there = part >= 0
        shown = np.sort(np.bincount(part[there], minlength=len(counts)))
        length = there.sum(1)
        rows = length > 0
        n = len(counts)
        result[f"coverage@{k}"] = float((shown > 0).sum() / n)
        for name, value in (("popularity", counts), ("novelty", information)):
            summed = np.where(there, value[part], 0.0).sum(1)
            result[f"{name}@{k}"] = float((summed[rows] / length[rows]).mean()) if rows.any() else 0.0
        weights = 2 * np.arange(1, n + 1) - n - 1
        result[f"gini@{k}"] = float((weights * shown).sum() / (n * max(shown.sum(), 1)))
    return result
