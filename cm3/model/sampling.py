"""Batches of training pairs with sampled items, and the distinct users and items of each batch with their counts."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cm3.common.arrays import blocks

NegativeSampling = Literal["negative", "positive", "uniform"]
"""How a pair's second item is chosen: not in the user's pairs, the pair's own, or any."""


@dataclass(frozen=True)
class CountedIds:
    """The users or items of a batch.

    Attributes:
        ids: (n,) the distinct ids; without counts, those of the batch as they are, repeated ones included.
        counts: (n,) how often each occurs in the batch, or None.
        positions: (B,) position in `ids` of each entry of the batch.
    """

    ids: Tensor
    counts: Tensor | None
    positions: Tensor


@dataclass(frozen=True)
class Batch:
    """Training pairs.

    Attributes:
        users, items: (B,) indices of the pairs.
        negatives: (B,) one sampled item per pair.
        counted_users, counted_negatives: users and negatives with repetitions counted, for the uniformity losses.
    """

    users: Tensor
    items: Tensor
    negatives: Tensor
    counted_users: CountedIds
    counted_negatives: CountedIds


class Sampler:
    """Shuffles the training pairs anew each epoch and samples one item per pair, on the device.

    Every draw depends on (seed, epoch) alone, so training resumes at any batch without a stored generator.
    """

    def __init__(
        self,
        users: Tensor,
        items: Tensor,
        n_items: int,
        *,
        batch_size: int,
        negative_sampling: NegativeSampling,
        dedup_pairs: bool,
        seed: int,
    ) -> None:
        """Take (E,) user and item indices; the device is theirs.

        Args:
            users, items: the training pairs, int32 or int64; the samplers of both draw the same.
            n_items: I.
            batch_size: pairs per batch.
            negative_sampling: items not in the user's pairs (negative), the pairs' own (positive), any (uniform).
            dedup_pairs: whether repeated ids of a batch are replaced by counts.
            seed: of shuffling and sampling.

        Raises:
            ValueError: negative_sampling is negative and some user has every item.
        """
        self.users, self.items, self.n_items = users, items, n_items
        self.batch_size, self.dedup_pairs, self.seed = batch_size, dedup_pairs, seed
        self.negative_sampling = negative_sampling
        if negative_sampling == "negative":
            most, user = torch.bincount(self._pairs() // n_items).max(0)
            if most >= n_items:
                raise ValueError(f"user {int(user)} has interacted with all {n_items} items: no negative to sample")

    @property
    def n_batches(self) -> int:
        """Batches of an epoch, the last of which may be short."""
        return -(-len(self.users) // self.batch_size)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of epoch `number` from batch `first` on."""
        generator = seeded_generator(self.users.device, derived_seed(self.seed, number))
        order = torch.randperm(len(self.users), generator=generator, device=self.users.device)
        drawn = None if self.negative_sampling == "positive" else self._draw(self.users[order], generator)
        order = order.to(self.users.dtype)
        yield from itertools.islice(self._batches(order, drawn), first, None)

    def _batches(self, order: Tensor, drawn: Tensor | None) -> Iterator[Batch]:
        size = self.batch_size
        for span in blocks(len(order), counted_at_once(order.device.type, size)):
            here = order[span]
            users, items = self.users[here].long(), self.items[here].long()
            negatives = items if drawn is None else drawn[span].long()
            counted = (count_by_batch(ids, size, self.dedup_pairs) for ids in (users, negatives))
            parts = (ids.split(size) for ids in (users, items, negatives))
            for part in zip(*parts, *counted, strict=True):
                yield Batch(*part)

    def _draw(self, users: Tensor, generator: torch.Generator) -> Tensor:
        """Return an item per user, in the type of the pairs."""
        drawn = self._uniform(len(users), generator)
        if self.negative_sampling == "uniform":
            return drawn.to(users.dtype)
        pairs = self._pairs()  # once an epoch: kept, they would take twice the memory of the items
        taken = torch.nonzero(self._are_among(pairs, users, drawn)).squeeze(1)
        while len(taken):
            again = self._uniform(len(taken), generator)
            drawn[taken] = again
            taken = taken[self._are_among(pairs, users[taken], again)]
        return drawn.to(users.dtype)

    def _uniform(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.n_items, (n,), generator=generator, device=self.users.device)

    def _pairs(self) -> Tensor:
        """Return the distinct training pairs as user * I + item, ascending."""
        found: Tensor = torch.unique(self.users.long() * self.n_items + self.items)
        return found

    def _are_among(self, pairs: Tensor, users: Tensor, items: Tensor) -> Tensor:
        key = users.long() * self.n_items + items
        position = torch.searchsorted(pairs, key).clamp_max_(len(pairs) - 1)
        found: Tensor = pairs[position] == key
        return found


COUNTED_AT_ONCE, CPU_COUNTED_AT_ONCE = 2**20, 2**18
"""Entries of which `count_by_batch` counts the batches in one call: sorting takes several times their memory."""


def counted_at_once(device_type: str, batch_size: int) -> int:
    """Return that number, of whole batches."""
    most = CPU_COUNTED_AT_ONCE if device_type == "cpu" else COUNTED_AT_ONCE
    return max(1, most // batch_size) * batch_size


def count_by_batch(ids: Tensor, batch_size: int, dedup_pairs: bool) -> Iterator[CountedIds]:
    """Yield the distinct ids of each batch of (E,) ids with counts; without `dedup_pairs`, all ids.

    Many batches are counted in one call: a device is synchronised once for some `COUNTED_AT_ONCE` ids.
    """
    if not dedup_pairs:
        for part in ids.split(batch_size):
            yield CountedIds(part, None, torch.arange(len(part), device=ids.device))
        return
    for part in ids.split(counted_at_once(ids.device.type, batch_size)):
        yield from _counted(part, batch_size)


def _counted(ids: Tensor, batch_size: int) -> list[CountedIds]:
    n = int(ids.max()) + 1
    batch = torch.arange(len(ids), device=ids.device).div(batch_size, rounding_mode="floor")
    keys, positions, counts = torch.unique(batch * n + ids, return_inverse=True, return_counts=True)
    found = torch.bincount(keys // n)
    positions -= (found.cumsum(0) - found)[batch]
    sizes = found.tolist()
    parts = zip((keys % n).split(sizes), counts.split(sizes), positions.split(batch_size), strict=True)
    return [CountedIds(*part) for part in parts]


def derived_seed(*parts: int) -> int:
    """Return a 63-bit seed; different `parts` give independent random streams."""
    # The length is included: trailing zeros alone would not change the sequence.
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> 1)


def seeded_generator(device: torch.device, seed: int) -> torch.Generator:
    """Return a generator of a device with a seed."""
    return torch.Generator(device).manual_seed(seed)


SMALL_ALPHA = 0.01
"""Below it, both gamma variates of a Beta variate often underflow, even in float64."""


def mixing_parameters(alpha: float, n: int, device: torch.device, seed: int) -> Tensor:
    """Draw t ~ Beta(alpha, alpha), (n,) float32, on `device`, by `seed`; the global generators are not changed."""
    source = torch.device("cpu") if device.type == "mps" else device
    with torch.random.fork_rng(devices=[source] if source.type == "cuda" else []):
        # torch.manual_seed would seed the generators of all GPUs.
        (torch.cuda.manual_seed if source.type == "cuda" else torch.default_generator.manual_seed)(seed)
        return (_by_log_gamma if alpha < SMALL_ALPHA else _beta)(alpha, n, source).float().to(device)


def _beta(alpha: float, n: int, device: torch.device) -> Tensor:
    # torch draws the underlying gamma variates in float64 on the CPU, but in the type of the result on a GPU, where
    # those of alpha below .05 underflow in float32.
    dtype = torch.float64 if device.type == "cuda" else torch.float32
    shape = torch.full((n,), alpha, dtype=dtype, device=device)
    return torch.distributions.Beta(shape, shape, validate_args=False).sample()


def _by_log_gamma(alpha: float, n: int, device: torch.device) -> Tensor:
    """Draw from Beta(alpha, alpha) as G / (G + H), with gamma variates by their logarithms: log G_a = log G_{a+1} + log(U) / a.

    Source: Devroye, Non-Uniform Random Variate Generation (1986), section IX.3.
    """
    shape = torch.full((2, n), alpha + 1, dtype=torch.float64, device=device)
    logs = torch._standard_gamma(shape).log() + torch.rand_like(shape).log() / alpha
    return (logs[0] - logs[1]).sigmoid()
