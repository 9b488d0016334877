"""Full ranking of all items for many users, and the validation score of a split."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn import functional

from cm3.common.device import is_out_of_memory
from cm3.common.topk import top_k, top_k_and_ties
from cm3.evaluation.hits import hit_matrix, hits_on_device, pair_keys
from cm3.evaluation.registry import Metric, metric_class

log = logging.getLogger(__name__)

BLOCK_ENTRIES = 7_000_000  # scores per block on the CPU: they fit the cache, and glibc reuses freed blocks up to 32 MiB
BLOCK_USERS = 320
"""Users per block on the CPU where that is more, as long as `LARGE_BLOCK_ENTRIES` allows it: a product of few rows reads all
items for little arithmetic."""
LARGE_BLOCK_ENTRIES = 2**25
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
        self.block = block_users(self.n_items, self.users.device.type)
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
        return self.top_by(ProductScores(users, items), k)

    def top_by(self, score: Callable[[Tensor], Tensor], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the same as `top` for any function from user indices (b,) to scores (b, I) on this device.

        The scores are overwritten, and not read after the next call.
        """
        width = min(k, self.n_items)
        best = np.full((len(self.users), k), -1, np.int64)
        values = np.full((len(self.users), k), -np.inf, np.float32)
        if self.users.device.type != "cpu":
            lists = self.on_device(score, width)
            self.settle(lists, lists.tied.tolist(), score)
            best[:, :width], values[:, :width] = lists.items.cpu().numpy(), lists.scores.cpu().numpy()
            return best, values
        for start, stop, indices, top, _ in self._blocks(score, width, top_k_settled):
            best[start:stop, :width] = indices.numpy()
            values[start:stop, :width] = top.numpy()
        return best, values

    def on_device(self, score: Callable[[Tensor], Tensor], k: int) -> "DeviceLists":
        """Return the lists of all chosen users for k <= I, without waiting for the device; `settle` makes them final."""
        blocks = list(self._blocks(score, k, top_k_and_ties))
        spans = [(start, stop) for start, stop, *_ in blocks]
        if not blocks:
            empty = self.users.new_zeros(0, k)
            return DeviceLists(empty, empty.float(), spans, torch.zeros(0, dtype=torch.bool, device=empty.device))
        items, scores = torch.cat([block[2] for block in blocks]), torch.cat([block[3] for block in blocks])
        return DeviceLists(items, scores, spans, torch.stack([block[4].any() for block in blocks]))

    @torch.no_grad()
    def settle(self, lists: "DeviceLists", tied: Sequence[bool], score: Callable[[Tensor], Tensor]) -> None:
        """Rank the blocks that are `tied` once more, in place; of equal scores the lower items are then kept."""
        for (start, stop), again in zip(lists.spans, tied, strict=True):
            if again:
                found = self._best(score, start, stop, lists.items.shape[1], top_k_settled)
                lists.items[start:stop], lists.scores[start:stop] = found[:2]

    @torch.no_grad()
    def _blocks(
        self, score: Callable[[Tensor], Tensor], k: int, select: "Select"
    ) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
        start = 0
        while start < len(self.users):
            stop = min(start + self.block, len(self.users))
            try:
                found = self._best(score, start, stop, k, select)
            except (RuntimeError, MemoryError) as error:
                if self.block == 1 or not is_out_of_memory(error):
                    raise
                self.block = -(-(stop - start) // 2)
                log.warning("out of memory while ranking; continuing with blocks of %d users", self.block)
                continue
            yield start, stop, *found
            start = stop

    def _best(
        self, score: Callable[[Tensor], Tensor], start: int, stop: int, k: int, select: "Select"
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.users[start:stop]
        # A block below the multiple is one that memory was too small for.
        scores = padded_scores(score, rows) if self.block >= ROW_MULTIPLE else score(rows)
        part = slice(self.offsets[start], self.offsets[stop])
        scores[self.rows[part] - start, self.columns[part]] = -torch.inf
        indices, top, tied = select(scores, k)
        return indices.masked_fill_(top == -torch.inf, -1), top, tied


def padded_scores(score: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Return the scores (b, I) of users (b,), computed for a multiple of `ROW_MULTIPLE` of them."""
    padding = rows[-1:].expand(-len(rows) % ROW_MULTIPLE)
    return score(torch.cat([rows, padding]))[: len(rows)]


def block_users(n_items: int, device_type: str) -> int:
    """Return how many users to rank at a time."""
    n_items = max(1, n_items)
    if device_type != "cpu":
        return max(1, CUDA_BLOCK_ENTRIES // n_items)
    return max(1, BLOCK_ENTRIES // n_items, min(BLOCK_USERS, LARGE_BLOCK_ENTRIES // n_items))


class ProductScores:
    """Scores of users (b,) for all items, (b, I), by the products of their embeddings, (U, D) and (I, D).

    On the CPU a call overwrites the scores of the one before: page faults of fresh memory cost as much as half of the
    arithmetic.
    """

    def __init__(self, users: Tensor, items: Tensor, unit: bool = False) -> None:
        """With `unit`, vectors of users are normalised; those of items are taken as they are."""
        self.users, self.items, self.unit = users, items, unit
        self.buffer = users.new_empty(0, len(items))

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """Return the scores."""
        vectors = self.users[rows]
        if self.unit:
            vectors = functional.normalize(vectors, dim=1)
        if vectors.device.type != "cpu":
            return vectors @ self.items.T
        if len(self.buffer) < len(rows):
            self.buffer = vectors.new_empty(len(rows), len(self.items))
        return torch.mm(vectors, self.items.T, out=self.buffer[: len(rows)])


Select = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]


def top_k_settled(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `top_k` in the form of `top_k_and_ties`, with no tie left."""
    return *top_k(scores, k), torch.zeros((), dtype=torch.bool, device=scores.device)


@dataclass(frozen=True)
class DeviceLists:
    """Ranked lists of R users on a device.

    Attributes:
        items, scores: (R, k), best first; -1 and -inf after the last item.
        spans: first user and end of each of B blocks.
        tied: (B,) bool, whether equal scores at the end of a list are not settled in a block.
    """

    items: Tensor
    scores: Tensor
    spans: list[tuple[int, int]]
    tied: Tensor


class Validation:
    """Users, truth and masks of one split, to score embeddings by one metric after every epoch."""

    def __init__(
        self,
        truth: sp.csr_matrix,
        masked: sp.csr_matrix,
        monitor: str,
        device: torch.device | str = "cpu",
        on_device: bool | None = None,
    ) -> None:
        """Take truth and masked items, (U, I) each, and a metric at a cut-off, such as recall@20.

        Args:
            on_device: count the hits on the device, so that one number leaves it; None: on all devices but the CPU. Only
                additive metrics are; on the CPU the value differs from that of NumPy in the last digit.

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
        where = self.ranking.users.device
        self.on_device = self.metric.additive and (where.type != "cpu" if on_device is None else on_device)
        if self.on_device:
            self.known = torch.from_numpy(pair_keys(self.truth)).to(where)
            gains = torch.from_numpy(hit_gains(self.metric, self.n_truth, self.k))
            self.gains = gains.to(where, torch.float32 if where.type == "mps" else torch.float64)

    def score(self, users: Tensor, items: Tensor) -> float:
        """Return the mean of the metric over the users that have truth, for embeddings (U, D) and (I, D)."""
        return self.score_by(ProductScores(users, items))

    def score_by(self, score: Callable[[Tensor], Tensor]) -> float:
        """Return the same for any function from user indices (b,) to scores (b, I)."""
        if not self.on_device:
            best, _ = self.ranking.top_by(score, self.k)
            return float(self.metric.values(hit_matrix(best, self.truth), self.n_truth, self.k).mean())
        lists = self.ranking.on_device(score, min(self.k, self.ranking.n_items))
        value, *tied = torch.cat([self.mean(lists)[None], lists.tied.to(self.gains.dtype)]).tolist()
        if any(tied):
            self.ranking.settle(lists, [bool(block) for block in tied], score)
            value = self.mean(lists).item()
        return float(value)

    @torch.no_grad()
    def mean(self, lists: DeviceLists) -> Tensor:
        """Return the mean of an additive metric over lists on the device, a scalar there."""
        hits = hits_on_device(lists.items, self.known, self.ranking.n_items)
        return torch.where(hits, self.gains[:, : hits.shape[1]], 0).sum() / len(hits)


def hit_gains(metric: type[Metric], n_truth: np.ndarray, k: int) -> np.ndarray:
    """Return what a hit at each rank adds to an additive metric of each user, (U, k) float64.

    Args:
        metric: its value is the sum over hits.
        n_truth: (U,) numbers of relevant items.
        k: cut-off.
    """
    sizes, places = np.unique(n_truth, return_inverse=True)
    by_size = [metric.values(np.eye(k, dtype=bool), np.full(k, size), k) for size in sizes]
    gains: np.ndarray = np.stack(by_size)[places]
    return gains
