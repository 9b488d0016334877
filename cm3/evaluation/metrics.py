"""Top-k metrics of each user, as they are usual in the field (full ranking, binary relevance)."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from cm3.evaluation.ranking import hit_matrix, ndcg, recall

NAMES = ("recall", "ndcg", "precision", "map", "hitrate", "mrr")


def per_user(recommended: np.ndarray, truth: sp.csr_matrix, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return each metric at each k as a (U,) float64 array under names such as "recall@20".

    With hit_j = 1 where the item at rank j is in the user's truth, and n the size of the truth:
    recall = sum_{j<=k} hit_j / n; precision = sum_{j<=k} hit_j / k; hitrate = 1 if any hit_j, j <= k;
    mrr = 1 / (rank of the first hit), 0 if it lies behind k;
    map = sum_{j<=k} hit_j precision@j / min(k, n);
    ndcg = sum_{j<=k} hit_j / log2(j + 1) over the same sum for min(k, n) hits in front.
    A user without truth gets 0 everywhere and should not be averaged over.

    Args:
        recommended: (U, K) integer item indices, best first, distinct in a row; -1 stands for no item.
        truth: (U, I) matrix whose non-zeros are the relevant items.
        ks: cut-offs, none above K.

    Raises:
        ValueError: a cut-off is below 1 or above K, or the numbers of users differ.
    """
    recommended = np.asarray(recommended)
    for k in ks:
        if not 0 < k <= recommended.shape[1]:
            raise ValueError(f"k = {k} is not between 1 and the {recommended.shape[1]} recommendations per user")
    return of_hits(hit_matrix(recommended, truth), np.diff(_binary(truth).indptr), ks)


def of_hits(hits: np.ndarray, n_truth: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return what `per_user` does from (U, K) hits by rank and (U,) sizes of the truth; no k is above K."""
    ranks = np.arange(1, hits.shape[1] + 1)
    found = hits.cumsum(1)
    summed = (hits * found / ranks).cumsum(1)
    first = np.where(hits.any(1), hits.argmax(1) + 1, np.inf)
    result = {}
    for k in ks:
        values = {
            "recall": recall(hits, n_truth, k),
            "ndcg": ndcg(hits, n_truth, k),
            "precision": found[:, k - 1] / k,
            "map": summed[:, k - 1] / np.maximum(np.minimum(n_truth, k), 1),
            "hitrate": (found[:, k - 1] > 0).astype(np.float64),
            "mrr": np.where(first <= k, 1 / first, 0.0),
        }
        result.update({f"{name}@{k}": values[name] for name in NAMES})
    return result


def _binary(truth: sp.csr_matrix) -> sp.csr_matrix:
    matrix = sp.csr_matrix(truth, copy=True)
    matrix.eliminate_zeros()
    matrix.sum_duplicates()
    return matrix
