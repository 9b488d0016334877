"""Calibration by category: whether a user's list has the categories of the user's history, in like proportions."""

import os
from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
import scipy.sparse as sp

from cm3.common.tables import ITEMS, read_table

SMOOTHING = 0.01
"""Share of the history's distribution in the list's, which keeps the divergence finite."""

BLOCK_ENTRIES = 4_000_000  # users times categories in a block


def read_item_categories(path: str | os.PathLike[str]) -> sp.csr_matrix | None:
    """Return p(c|i) of the item table, (I, C): 1/n for each of an item's n categories; None where no item has any.

    Raises:
        UserError: absent, unreadable, or no item table.
    """
    column = read_table(path, ITEMS, ["categories"]).column("categories").combine_chunks()
    names = pc.list_flatten(column)
    items = pc.list_parent_indices(column).to_numpy()
    if not len(names):
        return None
    codes = names.dictionary_encode()
    shape = (len(column), len(codes.dictionary))
    categories = sp.csr_matrix((np.ones(len(items)), (items, codes.indices.to_numpy())), shape)
    categories.data[:] = 1  # an item can have one category twice
    return _distributions(categories)


def category_divergence(
    lists: np.ndarray, history: sp.csr_matrix, categories: sp.csr_matrix, cutoffs: Sequence[int]
) -> dict[str, float]:
    """Return category_divergence@k, the mean over users of sum_c p(c) log(p(c) / q'(c)), in nats; 0 is calibrated.

    p is the mean of p(c|i) over a user's training items, q that over the first k recommendations, and
    q' = 0.99 q + 0.01 p. Items without a category are left out of both means. Users whose history or list has no
    category are left out; without any, the metric is 0.

    Steck, Calibrated Recommendations, RecSys 2018, equations 2 to 5, with unweighted items.

    Args:
        lists: (R, K) item indices, -1 after the end of a list.
        history: (R, I) training interactions of the same users.
        categories: (I, C) p(c|i), as `read_item_categories` returns it.
        cutoffs: values of k; those above K are skipped.
    """
    wanted = _distributions(history @ categories)
    result = {}
    for k in cutoffs:
        if k > lists.shape[1]:
            continue
        shown = _distributions(_selection(lists[:, :k], categories.shape[0]) @ categories)
        rows = np.flatnonzero((np.diff(wanted.indptr) > 0) & (np.diff(shown.indptr) > 0))
        size = max(1, BLOCK_ENTRIES // categories.shape[1])
        values = [
            _divergence(wanted[rows[at : at + size]], shown[rows[at : at + size]]) for at in range(0, len(rows), size)
        ]
        result[f"category_divergence@{k}"] = float(np.concatenate(values).mean()) if values else 0.0
    return result


def _divergence(wanted: sp.csr_matrix, shown: sp.csr_matrix) -> np.ndarray:
    p, q = wanted.toarray(), shown.toarray()
    ratio = np.divide(p, (1 - SMOOTHING) * q + SMOOTHING * p, out=np.ones_like(p), where=p > 0)
    found: np.ndarray = (p * np.log(ratio)).sum(1)
    return found


def _selection(lists: np.ndarray, n_items: int) -> sp.csr_matrix:
    """Return the (R, I) matrix that holds 1 for each item of a list."""
    rows, places = np.nonzero(lists >= 0)
    return sp.csr_matrix((np.ones(len(rows)), (rows, lists[rows, places])), (len(lists), n_items))


def _distributions(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """Return the matrix with rows scaled to sum 1; empty rows stay empty."""
    matrix = sp.csr_matrix(matrix, dtype=np.float64)
    matrix.eliminate_zeros()
    matrix.data /= np.repeat(np.asarray(matrix.sum(1)).ravel(), np.diff(matrix.indptr))
    return matrix
