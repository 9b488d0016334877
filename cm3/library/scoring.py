"""Lists of a trained model: its scores for user vectors or histories, ranked and, where it has parts, re-ranked."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cm3.common.topk import top_k
from cm3.evaluation.ranking import Ranking
from cm3.evaluation.rerank import Reranker
from cm3.evaluation.scores import Score

if TYPE_CHECKING:
    from cm3.library.recommender import Recommender

Vectors = Callable[["Recommender"], np.ndarray]
"""From a model to its vectors (R, D) of the users or histories that lists are wanted for."""


def scores(model: "Recommender", vectors: np.ndarray, history: sp.csr_matrix) -> Score:
    """Return the scores of R users, from their vectors (R, D) or, for item weights, their interactions (R, I)."""
    return model.weights.scores(history) if model.weights is not None else products(vectors, model.items)


def products(users: np.ndarray, items: np.ndarray) -> Score:
    """Return the scores of vectors (R, D) and (I, D)."""
    left, right = torch.from_numpy(np.ascontiguousarray(users)), torch.from_numpy(items)
    return lambda rows: left[rows] @ right.T


def best_items(
    model: "Recommender",
    vectors: Vectors,
    history: sp.csr_matrix,
    masked: sp.csr_matrix,
    allowed: np.ndarray | None,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (items, scores) of the k best of R users, (R, k), best first; item -1 after the end of a list.

    Args:
        model: with or without re-ranking.
        vectors: of the R users, in the model and in each part of its re-ranking.
        history: (R, I) interactions, for models with item weights.
        masked: (R, I) items to leave out.
        allowed: (I,) bool, the items that may be recommended; None for all.
        k: length of the lists.
    """
    base = scores(model, vectors(model), history)
    if model.reranking is None:
        return best_by(base, masked, allowed, k)
    within = _within(base, allowed)
    parts = {name: scores(part, vectors(part), history) for name, part in model.reranking.parts.items()}
    reranker = Reranker(within, parts, model.reranking.top, model.reranking.weights)
    return reranker(Ranking(np.arange(masked.shape[0]), masked), k)


def best_by(score: Score, masked: sp.csr_matrix, allowed: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what `best_items` does, by one score of the R users."""
    within = _within(score, allowed)
    if masked.shape[0] == 1:
        return _best_of_one(within, masked, min(k, masked.shape[1]))
    return Ranking(np.arange(masked.shape[0]), masked).top_by(within, k)


def _best_of_one(score: Score, masked: sp.csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what `Ranking.top_by` does for one user, in a fifth of the time: the block is not padded to 16 users."""
    values = score(torch.zeros(1, dtype=torch.int64))
    values[0, torch.from_numpy(masked.indices.astype(np.int64))] = -torch.inf
    items, best = top_k(values, k)
    return items.masked_fill_(best == -torch.inf, -1).numpy(), best.numpy()


def _within(score: Score, allowed: np.ndarray | None) -> Score:
    if allowed is None:
        return score
    outside = torch.from_numpy(~allowed)

    def within(rows: Tensor) -> Tensor:
        return score(rows).masked_fill_(outside, -torch.inf)

    return within
