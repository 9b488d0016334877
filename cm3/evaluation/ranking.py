"""Full ranking of all items for many users, and the validation score of a split."""

import logging
from collections.abc import Callable, Iterator

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cm3.common.topk import top_k
from cm3.evaluation.hits import hit_matrix
from cm3.evaluation.registry import metric_class

log = logging.getLogger(__name__)

BLOCK_ENTRIES = 7_000_000  # scores per block on the CPU: glibc reuses freed blocks up to 32 MiB without page faults
CUDA_BLOCK_ENTRIES = 2**26
ROW_MULTIPLE = 16
"""Rows of a block are padded to a multiple of this. A matrix product has another kernel for the rows after the last full
tile, whose sums differ in the last digit: without padding a user's scores would depend on the size of the block."""


class Ranking:
    """Ranks every item for chosen users by the product of their embeddings, without the masked items.

    Users are ranked in blocks; a block that does not fit into the GPU's memory halves the size of all later ones.
    """

    def __init__(self, users: np.ndarray, masked: sp.csr_matrix, device: torch.device | str = "cpu") -> None:
        """Take the indices (R,) of users to rank for and the items (U, I) to exclude per user."""
        rows = sp.csr_matrix(masked[users])
        self.n_items = rows.shape[1]
        self.users = torch.as_tensor(users, dtype=torch.int64, device=device)
        entries = BLOCK_ENTRIES if self.users.device.type == "cpu" else CUDA_BLOCK_ENTRIES
        self.block = max(1, entries // max(1, self.n_items))
        self.columns = torch.as_tensor(rows.indices, dtype=torch.int64, device=device)
        self.rows = torch.as_tensor(np.repeat(np.arange(len(users)), np.diff(rows.indptr)), device=device)
        self.offsets = rows.indptr

    def top(self, users: Tensor, items: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (items, scores) of the k best per chosen user, (R, k) int64 and float32, best first.

        Equal scores are ordered by lower item. After the last item of a shorter list, items are -1 and scores -inf.

        Args:
            users, items: (U, D) and (I, D) embeddings on this ranking's device.
            k: length of the lists; may exceed I.
        """
        return self.top_by(lambda rows: users[rows] @ items.T, k)

    def top_by(self, score: Callable[[Tensor], Tensor], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the same as `top` for any function from user indices (b,) to new scores (b, I) on this device."""
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
                log.warning("out of memory while ranking; continuing with blocks of %d users", self.block)
                continue
            yield start, *found
            start = stop

    def _best(self, score: Callable[[Tensor], Tensor], start: int, stop: int, k: int) -> tuple[Tensor, Tensor]:
        rows = self.users[start:stop]
        # A block below the multiple is one that memory was too small for.
        padding = rows[-1:].expand(-len(rows) % ROW_MULTIPLE if self.block >= ROW_MULTIPLE else 0)
        scores = score(torch.cat([rows, padding]))[: len(rows)]
        part = slice(self.offsets[start], self.offsets[stop])
        scores[self.rows[part] - start, self.columns[part]] = -torch.inf
        indices, top = top_k(scores, k)
        return indices.masked_fill_(top == -torch.inf, -1), top


class Validation:
    """Users, truth and masks of one split, to score embeddings by one metric after every epoch."""

    def __init__(
        self, truth: sp.csr_matrix, masked: sp.csr_matrix, monitor: str, device: torch.device | str = "cpu"
    ) -> None:
        """Take truth and masked items, (U, I) each, and a metric at a cut-off, such as recall@20.

        Raises:
            ValueError: no user has any truth.
        """
        self.metric, self.k = metric_class(monitor), int(monitor.partition("@")[2])
        self.n_truth = np.diff(truth.indptr)
        users = np.flatnonzero(self.n_truth)
        if not len(users):
            raise ValueError("no user has a row in this split")
        self.truth, self.n_truth = truth[users], self.n_truth[users]
        self.ranking = Ranking(users, masked, device)

    def score(self, users: Tensor, items: Tensor) -> float:
        """Return the mean of the metric over the users that have truth, for embeddings (U, D) and (I, D)."""
        return self.score_by(lambda rows: users[rows] @ items.T)

    def score_by(self, score: Callable[[Tensor], Tensor]) -> float:
        """Return the same for any function from user indices (b,) to scores (b, I)."""
        best, _ = self.ranking.top_by(score, self.k)
        return float(self.metric.values(hit_matrix(best, self.truth), self.n_truth, self.k).mean())
