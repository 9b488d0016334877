"""Hits: which recommended items are relevant to their user."""

import numpy as np
import scipy.sparse as sp


def hit_matrix(recommended: np.ndarray, truth: sp.csr_matrix) -> np.ndarray:
    """Return which recommended items (U, K) are in the user's row of the truth (U, I), bool (U, K); -1 never is.

    Raises:
        ValueError: another number of users, or an item outside of the matrix.
    """
    truth = binary(truth)
    n_users, n_items = truth.shape
    if len(recommended) != n_users:
        raise ValueError(f"{len(recommended)} users have recommendations, {n_users} have a row of truth")
    if recommended.size and recommended.max() >= n_items:
        raise ValueError(f"item {recommended.max()} is recommended, but there are {n_items} items")
    known = np.repeat(np.arange(n_users, dtype=np.int64), np.diff(truth.indptr)) * n_items + truth.indices
    if not len(known):
        return np.zeros(recommended.shape, bool)
    keys = np.arange(n_users, dtype=np.int64)[:, None] * n_items + recommended
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    hits: np.ndarray = (known[place] == keys) & (recommended >= 0)
    return hits


def binary(truth: sp.csr_matrix) -> sp.csr_matrix:
    """Return a copy without stored zeros and repeated entries, its columns sorted."""
    matrix = sp.csr_matrix(truth, copy=True)
    matrix.eliminate_zeros()
    matrix.sum_duplicates()
    return matrix
