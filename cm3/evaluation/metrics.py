"""Top-k metrics of each user: full ranking, binary relevance. `cm3.evaluation.registry` lists them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cm3.evaluation.registry import METRICS, Metric, metric_class

if TYPE_CHECKING:
    import scipy.sparse as sp


class Recall(Metric):
    """Recall@k."""

    version: ClassVar[int | None] = 1
    name = "recall"
    title = "Recall"
    additive = True
    formula = "hits among the first `k` / `n`"

    @staticmethod
    def values(hits: np.ndarray, n_truth: np.ndarray, k: int) -> np.ndarray:
        """Return the metric of each user."""
        found: np.ndarray = hits[:, :k].sum(1) / np.maximum(n_truth, 1)
        return found


class NDCG(Metric):
    """NDCG@k with binary gains."""

    version: ClassVar[int | None] = 1
    name = "ndcg"
    title = "NDCG"
    additive = True
    formula = "sum over hits at rank `j ≤ k` of 1 / log2(`j` + 1), / the same sum for min(`k`, `n`) hits in front"

    @staticmethod
    def values(hits: np.ndarray, n_truth: np.ndarray, k: int) -> np.ndarray:
        """Return the metric of each user."""
        discount = 1 / np.log2(np.arange(2, k + 2))
        ideal = np.concatenate([[1.0], np.cumsum(discount)])
        length = np.minimum(n_truth, k)
        # Summed in rank order: the rounding of a matrix product depends on a user's place among the others.
        gain = (hits[:, :k] * discount[: hits.shape[1]]).cumsum(1)[:, -1]
        return gain / np.where(length > 0, ideal[length], 1.0)


class Precision(Metric):
    """Precision@k."""

    version: ClassVar[int | None] = 1
    name = "precision"
    title = "Precision"
    additive = True
    formula = "hits among the first `k` / `k`"

    @staticmethod
    def values(hits: np.ndarray, n_truth: np.ndarray, k: int) -> np.ndarray:
        """Return the metric of each user."""
        found: np.ndarray = hits[:, :k].sum(1) / k
        return found


class MAP(Metric):
    """Average precision@k, whose mean over users is MAP@k."""

    version: ClassVar[int | None] = 1
    name = "map"
    title = "MAP"
    formula = "sum over hits at rank `j ≤ k` of precision at `j`, / min(`k`, `n`)"

    @staticmethod
    def values(hits: np.ndarray, n_truth: np.ndarray, k: int) -> np.ndarray:
        """Return the metric of each user."""
        first = hits[:, :k]
        precision = first.cumsum(1) / np.arange(1, first.shape[1] + 1)
        found: np.ndarray = (first * precision).cumsum(1)[:, -1] / np.maximum(np.minimum(n_truth, k), 1)
        return found


class HitRate(Metric):
    """Hit rate@k."""

    version: ClassVar[int | None] = 1
    name = "hitrate"
    title = "Hit rate"
    formula = "1 if there is a hit among the first `k`, else 0"

    @staticmethod
    def values(hits: np.ndarray, n_truth: np.ndarray, k: int) -> np.ndarray:
        """Return the metric of each user."""
        return np.where(hits[:, :k].any(1), 1.0, 0.0)


class MRR(Metric):
    """Reciprocal rank@k, whose mean over users is MRR@k."""

    version: ClassVar[int | None] = 1
    name = "mrr"
    title = "MRR"
    formula = "1 / rank of the first hit, 0 without a hit among the first `k`"

    @staticmethod
    def values(hits: np.ndarray, n_truth: np.ndarray, k: int) -> np.ndarray:
        """Return the metric of each user."""
        first = hits[:, :k]
        rank = first.argmax(1) + 1
        return np.where(first.any(1), 1 / rank, 0.0)


def per_user(recommended: np.ndarray, truth: "sp.csr_matrix", ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return each metric at each cut-off as a (U,) float64 array under names such as "recall@20".

    A user without truth gets 0 everywhere and should not be averaged over.

    Args:
        recommended: (U, K) integer item indices, best first, distinct in a row; -1 for no item.
        truth: (U, I) matrix whose non-zeros are the relevant items.
        ks: cut-offs, at most K.

    Raises:
        ValueError: a cut-off is below 1 or above K, or the numbers of users differ.
    """
    from cm3.evaluation.hits import binary, hit_matrix  # not at import: the plan reads versions from this module

    recommended = np.asarray(recommended)
    for k in ks:
        if not 0 < k <= recommended.shape[1]:
            raise ValueError(f"k = {k} is not between 1 and the {recommended.shape[1]} recommendations per user")
    return of_hits(hit_matrix(recommended, truth), np.diff(binary(truth).indptr), ks)


def of_hits(hits: np.ndarray, n_truth: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the values of `per_user` from hits by rank (U, K) and sizes of the truth (U,); no k is above K."""
    found = {name: metric_class(name).values for name in METRICS}
    return {f"{name}@{k}": values(hits, n_truth, k) for k in ks for name, values in found.items()}
