"""Intra-list diversity by content: how far apart the features of the items of one list are."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse as sp

from cm3.common.features import read_features

BLOCK_ENTRIES = 4_000_000  # users times width of the vectors in a block


def read_unit_vectors(path: str | os.PathLike[str], item_ids: Sequence[str]) -> np.ndarray:
    """Return the features (I, d) float32 of a file, scaled to length 1; zero for an item without a vector.

    Raises:
        UserError: absent, damaged, or of other items.
    """
    vectors = read_features(path, item_ids).embedding
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: np.ndarray = np.divide(vectors, norms, out=vectors, where=norms > 0)
    return found


def intra_list_diversity(
    lists: np.ndarray, vectors: Mapping[str, np.ndarray], cutoffs: Sequence[int]
) -> dict[str, float]:
    """Return diversity_{modality}@k, the mean over users of the mean of 1 - cosine over the pairs of the first k items.

    For n unit vectors x_i with sum s, the mean cosine of the pairs is (|s|^2 - n) / (n (n - 1)). Items without a vector are
    left out, and users with fewer than two others; without any user the metric is 0.

    Args:
        lists: (R, K) item indices, -1 after the end of a list.
        vectors: (I, d) unit vectors by modality, as `read_unit_vectors` returns them.
        cutoffs: values of k; those above K are skipped.

    Source: Ziegler et al., Improving recommendation lists through topic diversification (WWW 2005), for the mean over pairs.
    """
    return {
        f"diversity_{modality}@{k}": _mean_distance(lists[:, :k], x)
        for modality, x in vectors.items()
        for k in cutoffs
        if k <= lists.shape[1]
    }


def _mean_distance(lists: np.ndarray, x: np.ndarray) -> float:
    there = np.append(x.any(axis=1), False)  # index -1, after the end of a list, selects the appended entry
    size = max(1, BLOCK_ENTRIES // x.shape[1])
    found = []
    for start in range(0, len(lists), size):
        block = lists[start : start + size]
        rows, ranks = np.nonzero(there[block])
        n = np.bincount(rows, minlength=len(block))
        chosen = sp.csr_matrix((np.ones(len(rows), x.dtype), (rows, block[rows, ranks])), (len(block), len(x)))
        total = np.square(chosen @ x).sum(1, dtype=np.float64)
        some = n > 1
        n, total = n[some].astype(np.float64), total[some]
        found.append(1 - (total - n) / (n * (n - 1)))
    values = np.concatenate(found) if found else np.zeros(0)
    return float(np.maximum(values, 0).mean()) if len(values) else 0.0
