"""Beyond-accuracy metrics: coverage, popularity, novelty, Gini."""

from collections.abc import Sequence

import numpy as np

_BLOCK_USERS = 8192  # small blocks: allocating large arrays is slow


def beyond_accuracy(lists: np.ndarray, counts: np.ndarray, n_users: int, cutoffs: Sequence[int]) -> dict[str, float]:
    """Return coverage@k, popularity@k, novelty@k and gini@k of the first k recommendations.

    coverage: distinct items recommended to anyone / items. popularity: mean number of training interactions of a
    recommended item. novelty: mean self-information -log2(c_i / U) of a recommended item, bought c_i times by U
    users; a cold item counts as bought once. gini: sum_i (2 i - I - 1) n_(i) / (I sum n), where n_(1) <= ... <= n_(I)
    are the numbers of recommendations of each item: 0 if all are equal, (I - 1) / I if only one item is recommended.
    Popularity and novelty are averaged over each user's list first, then over the users with a list.

    Args:
        lists: (R, K) item indices, -1 after the end of a list.
        counts: (I,) training interactions of each item.
        n_users: U, users with training interactions.
        cutoffs: values of k; those above K are skipped.

    Source: Zhou et al., Solving the apparent diversity-accuracy dilemma (2010) for novelty.
    """
    information = np.log2(n_users) - np.log2(np.maximum(counts, 1))
    # After the end of a list, index -1 selects the appended 0.
    values = {"popularity": np.append(counts, 0.0), "novelty": np.append(information, 0.0)}
    n = len(counts)
    result = {}
    for k in cutoffs:
        if k > lists.shape[1]:
            continue
        blocks = np.array_split(lists[:, :k], len(lists) // _BLOCK_USERS + 1)
        times = np.zeros(n + 1, np.int64)
        for block in blocks:
            times += np.bincount(block.ravel() + 1, minlength=n + 1)
        shown = np.sort(times[1:])
        length = np.concatenate([(block >= 0).sum(1) for block in blocks])
        rows = length > 0
        result[f"coverage@{k}"] = float((shown > 0).sum() / n)
        for name, value in values.items():
            summed = np.concatenate([value[block].sum(1) for block in blocks])
            result[f"{name}@{k}"] = float((summed[rows] / length[rows]).mean()) if rows.any() else 0.0
        weights = 2 * np.arange(1, n + 1) - n - 1
        result[f"gini@{k}"] = float((weights * shown).sum() / (n * max(shown.sum(), 1)))
    return result
