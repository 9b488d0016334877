"""ItemKNN: item weights from the co-occurrence of items with the same users."""

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
import torch

from cm3.baselines.inputs import Inputs
from cm3.baselines.itemknn import ItemKNN
from cm3.evaluation.item_weights import ItemWeights

BLOCK_PRODUCTS = 30_000_000  # products per block of the co-occurrence matrix


def solve(inputs: Inputs, settings: ItemKNN, device: torch.device) -> ItemWeights:
    """Return W (I, I): w_ji = n_ij / (sqrt(n_i n_j) + shrink) for the k items j nearest to i, 0 elsewhere.

    n_i users have item i and n_ij have both. Each item is scored by its own k neighbours, so column i of W holds at
    most k entries; among equals the lower index is nearer. The definition is that of Ferrari Dacrema, Cremonesi and
    Jannach, Are We Really Making Much Progress?, RecSys 2019, whose code RecBole's ItemKNN shares; they credit Sarwar
    et al., WWW 2001. Never holds more co-occurrences than those of one block of items.
    """
    observed = sp.csr_matrix(inputs.interactions, dtype=np.float32)
    by_item = sp.csr_matrix(observed.T)
    length = np.sqrt(np.diff(by_item.indptr))
    targets, voters, values = [], [], []
    for block in item_blocks(by_item, observed):
        common = sp.coo_matrix(by_item[block] @ observed)
        target, voter = common.row + block.start, common.col
        value = common.data / (length[target] * length[voter] + settings.shrink)
        kept = _nearest(target, voter, np.where(target == voter, 0, value), settings.k)
        targets.append(target[kept])
        voters.append(voter[kept])
        values.append(value[kept].astype(np.float32))
    n = by_item.shape[0]
    pairs = (np.concatenate(voters), np.concatenate(targets))
    matrix = sp.csr_matrix((np.concatenate(values), pairs), (n, n))
    matrix.sort_indices()
    return ItemWeights(matrix)


def item_blocks(by_item: sp.csr_matrix, observed: sp.csr_matrix) -> Iterator[slice]:
    """Yield ranges of items whose rows of the co-occurrence matrix cost at most `BLOCK_PRODUCTS` products, or one item."""
    # A row costs as many products as its users have interactions.
    cost = (by_item @ np.diff(observed.indptr)).cumsum()
    starts = np.unique(np.searchsorted(cost, np.arange(0, cost[-1] + 1, BLOCK_PRODUCTS)))
    for start, stop in zip(starts, [*starts[1:], len(cost)], strict=True):
        yield slice(int(start), int(stop))


def _nearest(target: np.ndarray, voter: np.ndarray, value: np.ndarray, k: int) -> np.ndarray:
    """Return places of the k largest values above 0 of each target, ties by lower voter."""
    order = np.lexsort((voter, -value, target))
    order = order[value[order] > 0]
    ordered = target[order]
    first = np.searchsorted(ordered, ordered)
    return order[np.arange(len(order)) - first < k]
