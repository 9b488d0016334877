"""Full ranking of all items for many users, and the hit counts that validation needs."""

import logging
from collections.abc import Callable, Iterator

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cm3.common.topk import top_k

log = logging.getLogger(__name__)

_BLOCK_ENTRIES = 7_000_000  # of scores on the CPU: up to 32 MiB glibc gives freed memory out again, without page faults
_CUDA_BLOCK_ENTRIES = 2**26


class Ranking:
    """Ranks every item for chosen users by the product of their embeddings, without the masked items.

    Users go in blocks; where a block does not fit into the GPU's memory it is halved, for good.
    """

    def __init__(self, users: np.ndarray, masked: sp.csr_matrix, device: torch.device | str = "cpu") -> None:
        """Take the (R,) user indices to rank for and the (U, I) items to leave out per user."""
        rows = sp.csr_matrix(masked[users])
        self.n_items = rows.shape[1]
        self.users = torch.as_tensor(users, dtype=torch.int64, device=device)
        entries = _BLOCK_ENTRIES if self.users.device.type == "cpu" else _CUDA_BLOCK_ENTRIES
        self.block = max(1, entries // max(1, self.n_items))
        self.columns = torch.as_tensor(rows.indices, dtype=torch.int64, device=device)
        self.rows = torch.as_tensor(np.repeat(np.arange(len(users)), np.diff(rows.indptr)), device=device)
        self.offsets = rows.indptr

    def top(self, users: Tensor, items: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (items, scores) of the k best per chosen user, (R, k) int64 and float32, best first.

        Equal scores are ordered by lower item. Where fewer than k items are left the item is -1, the score -inf.

        Args:
            users, items: (U, D) and (I, D) embeddings on this ranking's device.
            k: length of the lists; may exceed I.
        """
        return self.top_by(lambda rows: users[rows] @ items.T, k)

    def top_by(self, score: Callable[[Tensor], Tensor], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what `top` does for any function from user indices (b,) to fresh scores (b, I) on this device."""
        width = min(k, self.n_items)
        best = np.full((len(self.users), k), -1, np.int64)
        values = np.full((len(self.users), k), -np.inf, np.float32)
        for start, indices, top in self._blocks(score, width):
            best[start : start + len(top), :width] = indices.cpu().numpy()
            values[start : start + len(top), :width] = top.cpu().numpy()
        return best, values

    @torch.no_grad()
    def _blocks(self, score: Callable[[Tensor], Tensor], k: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        start = 0
        while start < len(self.users):
            stop = min(start + self.block, len(self.users))
            try:
                found = self._best(score, start, stop, k)
            except torch.OutOfMemoryError:
                if self.block == 1:
                    raise
                self.block = -(-(stop - start) // 2)
                log.warning("out of memory while ranking; going on with blocks of %d users", self.block)
                continue
            yield start, *found
            start = stop

    def _best(self, score: Callable[[Tensor], Tensor], start: int, stop: int, k: int) -> tuple[Tensor, Tensor]:
        scores = score(self.users[start:stop])
        part = slice(self.offsets[start], self.offsets[stop])
        scores[self.rows[part] - start, self.columns[part]] = -torch.inf
        indices, top = top_k(scores, k)
        return indices.masked_fill_(top == -torch.inf, -1), top


def hit_matrix(recommended: np.ndarray, truth: sp.csr_matrix) -> np.ndarray:
    """Return which of the (U, K) recommended items are in the user's truth, a (U, I) matrix; -1 never is. Bool (U, K)."""
    truth = sp.csr_matrix(truth, copy=True)
    truth.eliminate_zeros()
    truth.sum_duplicates()
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
    return (known[place] == keys) & (recommended >= 0)


def recall(hits: np.ndarray, n_truth: np.ndarray, k: int) -> np.ndarray:
    """recall@k per user: hits among the first k over the size of the truth; 0 where there is no truth."""
    return hits[:, :k].sum(1) / np.maximum(n_truth, 1)


def ndcg(hits: np.ndarray, n_truth: np.ndarray, k: int) -> np.ndarray:
    """ndcg@k per user: sum_j hit_j / log2(j + 1) for ranks j <= k, over that of min(k, n_truth) hits in front."""
    discount = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[1.0], np.cumsum(discount)])
    length = np.minimum(n_truth, k)
    # Summed in rank order, not by a matrix product, whose rounding depends on a user's place among the others.
    gain = (hits[:, :k] * discount[: hits.shape[1]]).cumsum(1)[:, -1]
    return gain / np.where(length > 0, ideal[length], 1.0)


MONITORS = {"recall": recall, "ndcg": ndcg}


class Validation:
    """One split's users, truth and masks, ready to score embeddings again and again."""

    def __init__(
        self, truth: sp.csr_matrix, masked: sp.csr_matrix, monitor: str, device: torch.device | str = "cpu"
    ) -> None:
        """Take (U, I) truth and masked items and the metric's name, such as recall@20.

        Raises:
            ValueError: no user has any truth.
        """
        name, k = monitor.split("@")
        self.metric, self.k = MONITORS[name], int(k)
        self.n_truth = np.diff(truth.indptr)
        users = np.flatnonzero(self.n_truth)
        if not len(users):
            raise ValueError("no user has a row in this split")
        self.truth, self.n_truth = truth[users], self.n_truth[users]
        self.ranking = Ranking(users, masked, device)

    def score(self, users: Tensor, items: Tensor) -> float:
        """Return the metric's mean over the users that have truth, for (U, D) and (I, D) embeddings."""
        return self.score_by(lambda rows: users[rows] @ items.T)

    def score_by(self, score: Callable[[Tensor], Tensor]) -> float:
        """Return the same for any function from user indices (b,) to scores (b, I)."""
        best, _ = self.ranking.top_by(score, self.k)
        return float(self.metric(hit_matrix(best, self.truth), self.n_truth, self.k).mean())
