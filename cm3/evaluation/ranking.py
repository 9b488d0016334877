"""Full ranking of all items for many users, and the validation score of a split."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cm3.common.device import is_out_of_memory
from cm3.common.distributed import ProcessShard
from cm3.common.topk import top_k, top_k_and_ties
from cm3.evaluation.hits import hit_matrix, hits_on_device, pair_keys
from cm3.evaluation.products import ROW_MULTIPLE, ProductScores, ReducedProducts, padded_scores
from cm3.evaluation.registry import Metric, metric_class

log = logging.getLogger(__name__)

BLOCK_ENTRIES = 7_000_000  # scores per block on the CPU: they fit the cache, and glibc reuses freed blocks up to 32 MiB
BLOCK_USERS = 320
"""Users per block on the CPU where that is more, as long as `LARGE_BLOCK_ENTRIES` allows it: a product of few rows reads all
items for little arithmetic."""
LARGE_BLOCK_ENTRIES = 2**25
CUDA_BLOCK_ENTRIES = 2**26
REDUCED_USERS = 1024
"""Users from which copies of the items in bfloat16 pay off."""
FUTILE = 0.5
"""Share of lists without certainty in the first block at which bfloat16 products are given up."""


class Ranking:
    """Ranks every item for chosen users by the product of their embeddings, without the masked items.

    Users are ranked in blocks; a block that does not fit into the GPU's memory halves the size of all later ones.
    """

    def __init__(self, users: np.ndarray, masked: sp.csr_matrix, device: torch.device | str = "cpu") -> None:
        """Take the indices (R,) of users to rank for and the items (U, I) to exclude per user."""
        self.n_items = masked.shape[1]
        self.users = torch.as_tensor(users, dtype=torch.int64, device=device)
        self.block = block_users(self.n_items, self.users.device.type)
        self._set_masked(sp.csr_matrix(masked[users]))

    def _set_masked(self, rows: sp.csr_matrix) -> None:
        self.columns = torch.as_tensor(rows.indices, dtype=torch.int32, device=self.users.device)
        self.counts = torch.as_tensor(np.diff(rows.indptr).astype(np.int64), device=self.users.device)
        self.offsets = rows.indptr

    def _of(self, chosen: np.ndarray) -> "Ranking":
        """Return the ranking for some of the users, given their places; on the CPU."""
        shape = (len(self.users), self.n_items)
        whole = sp.csr_matrix((np.ones(len(self.columns), bool), self.columns.numpy(), self.offsets), shape)
        found = copy.copy(self)
        found.users = self.users[chosen]
        found._set_masked(whole[chosen])
        return found

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
        left = np.arange(len(self.users))
        if isinstance(score, ProductScores) and len(left) >= REDUCED_USERS and (reduced := score.reduced(width)):
            left = self._rank_reduced(score, reduced, best[:, :width], values[:, :width])
        rest = self if len(left) == len(self.users) else self._of(left)
        for start, stop, indices, top, _ in rest._blocks(score, width, top_k_settled):
            best[left[start:stop], :width] = indices.numpy()
            values[left[start:stop], :width] = top.numpy()
        return best, values

    def _rank_reduced(
        self, score: ProductScores, reduced: ReducedProducts, best: np.ndarray, values: np.ndarray
    ) -> np.ndarray:
        """Fill in the lists (R, k) that bfloat16 products make certain, and return the rows of the others."""
        left = np.ones(len(best), bool)
        scaled = copy.copy(self)
        scaled.block = 2 * self.block  # their scores take half the memory

        def find(start: int, stop: int) -> Found:
            vectors = score.vectors(self.users[start:stop])
            return reduced.top(vectors, best.shape[1], self._masked_entries(start, stop))

        for start, stop, indices, top, unsure in scaled._in_blocks(find):
            best[start:stop], values[start:stop], left[start:stop] = indices.numpy(), top.numpy(), unsure.numpy()
            if not start and left[:stop].mean() > FUTILE:
                break
        return np.flatnonzero(left)

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

    def _blocks(
        self, score: Callable[[Tensor], Tensor], k: int, select: "Select"
    ) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
        return self._in_blocks(lambda start, stop: self._best(score, start, stop, k, select))

    @torch.no_grad()
    def _in_blocks(self, find: Callable[[int, int], "Found"]) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
        start = 0
        while start < len(self.users):
            stop = min(start + self.block, len(self.users))
            try:
                found = find(start, stop)
            except (RuntimeError, MemoryError) as error:
                if self.block == 1 or not is_out_of_memory(error):
                    raise
                self.block = -(-(stop - start) // 2)
                log.warning("out of memory while ranking; continuing with blocks of %d users", self.block)
                continue
            yield start, stop, *found
            start = stop

    def _best(self, score: Callable[[Tensor], Tensor], start: int, stop: int, k: int, select: "Select") -> "Found":
        rows = self.users[start:stop]
        # A block below the multiple is one that memory was too small for.
        scores = padded_scores(score, rows) if self.block >= ROW_MULTIPLE else score(rows)
        scores[self._masked_entries(start, stop)] = -torch.inf
        indices, top, tied = select(scores, k)
        return indices.masked_fill_(top == -torch.inf, -1), top, tied

    def _masked_entries(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        columns = self.columns[self.offsets[start] : self.offsets[stop]].long()
        # The number of entries is known here: a GPU is not waited for.
        return torch.repeat_interleave(self.counts[start:stop], output_size=len(columns)), columns


def block_users(n_items: int, device_type: str) -> int:
    """Return how many users to rank at a time."""
    n_items = max(1, n_items)
    if device_type != "cpu":
        return max(1, CUDA_BLOCK_ENTRIES // n_items)
    return max(1, BLOCK_ENTRIES // n_items, min(BLOCK_USERS, LARGE_BLOCK_ENTRIES // n_items))


Found = tuple[Tensor, Tensor, Tensor]
"""Items and scores (b, k) of the best, and (b,) or () bool: lists that are not final."""
Select = Callable[[Tensor, int], Found]


def top_k_settled(scores: Tensor, k: int) -> Found:
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
        shard: ProcessShard | None = None,
    ) -> None:
        """Take truth and masked items, (U, I) each, and a metric at a cut-off, such as recall@20.

        Args:
            on_device: count the hits on the device, so that one number leaves it; None: on all devices but the CPU. Only
                additive metrics are; on the CPU the value differs from that of NumPy in the last digit.
            shard: of several processes, each of which scores a part of the users and gets the mean over all.

        Raises:
            ValueError: no user has any truth.
        """
        self.metric, self.k = metric_class(monitor), int(monitor.partition("@")[2])
        self.n_truth = np.diff(truth.indptr)
        users = np.flatnonzero(self.n_truth)
        if not len(users):
            raise ValueError("no user has a row in this split")
        self.shard = shard
        if shard:
            users = users[shard.pairs(len(users))]
        self.truth, self.n_truth = truth[users], self.n_truth[users]
        self.ranking = Ranking(users, masked, device)
        where = self.ranking.users.device
        self.on_device = self.metric.additive and (where.type != "cpu" if on_device is None else on_device)
        if self.on_device and len(users):
            self.known = torch.from_numpy(pair_keys(self.truth)).to(where)
            gains = torch.from_numpy(hit_gains(self.metric, self.n_truth, self.k))
            self.gains = gains.to(where, torch.float32 if where.type == "mps" else torch.float64)

    def score(self, users: Tensor, items: Tensor) -> float:
        """Return the mean of the metric over the users that have truth, for embeddings (U, D) and (I, D)."""
        return self.score_by(ProductScores(users, items))

    def score_by(self, score: Callable[[Tensor], Tensor]) -> float:
        """Return the same for any function from user indices (b,) to scores (b, I)."""
        n = len(self.n_truth)
        value = self._mean_by(score) if n else 0.0
        return self.shard.mean(value, n) if self.shard else value

    def _mean_by(self, score: Callable[[Tensor], Tensor]) -> float:
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
