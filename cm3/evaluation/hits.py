"""Hits: which recommended items are relevant to their user."""

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cm3.common.arrays import blocks


def hit_matrix(recommended: np.ndarray, truth: sp.csr_matrix) -> np.ndarray:
    """Return which recommended items (U, K) are in the user's row of the truth (U, I), bool (U, K); -1 never is.

    Raises:
        ValueError: another number of users, or an item outside of the matrix.
    """
    n_users, n_items = truth.shape
    if len(recommended) != n_users:
        raise ValueError(f"{len(recommended)} users have recommendations, {n_users} have a row of truth")
    if recommended.size and recommended.max() >= n_items:
        raise ValueError(f"item {recommended.max()} is recommended, but there are {n_items} items")
    known = pair_keys(truth)
    if not len(known):
        return np.zeros(recommended.shape, bool)
    hits = np.zeros(recommended.shape, bool)
    for rows in blocks(n_users):  # keys and places of all users would take 16 bytes an item of a list
        some = recommended[rows]
        keys = np.arange(rows.start, rows.stop, dtype=np.int64)[:, None] * n_items + some
        place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        hits[rows] = (known[place] == keys) & (some >= 0)
    return hits


def pair_keys(truth: sp.csr_matrix) -> np.ndarray:
    """Return row * I + column of the entries of (U, I) that are not zero, int64, ascending and distinct."""
    truth = binary(truth)
    n_users, n_items = truth.shape
    keys: np.ndarray = np.repeat(np.arange(n_users, dtype=np.int64), np.diff(truth.indptr)) * n_items + truth.indices
    return keys


def hits_on_device(recommended: Tensor, known: Tensor, n_items: int) -> Tensor:
    """Return `hit_matrix` for tensors of one device, without waiting for it.

    Args:
        recommended: (U, K) int64, -1 after the last item.
        known: `pair_keys` of the truth, at least one.
        n_items: I.
    """
    rows = torch.arange(len(recommended), device=recommended.device)
    keys = rows[:, None] * n_items + recommended
    place = torch.searchsorted(known, keys).clamp_max_(len(known) - 1)
    return (known[place] == keys) & (recommended >= 0)


def binary(truth: sp.csr_matrix) -> sp.csr_matrix:
    """Return a copy without stored zeros and repeated entries, its columns sorted."""
    matrix = sp.csr_matrix(truth, copy=True)
    matrix.eliminate_zeros()
    matrix.sum_duplicates()
    return matrix
