"""Batches of training pairs with the items that the uniformity loss spreads."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Contrast = Literal["negative", "positive", "uniform"]


@dataclass(frozen=True)
class Spread:
    """Users or items that a uniformity loss spreads, (n,) ids; with counts, distinct ids and how often each stands.

    `places` (B,) says where in `ids` each entry of the batch stands.
    """

    ids: Tensor
    counts: Tensor | None
    places: Tensor


@dataclass(frozen=True)
class Batch:
    """Training pairs, users (B,) and items (B,), an item (B,) to contrast with each pair's own, and the users and items
    that the uniformity losses spread."""

    users: Tensor
    items: Tensor
    contrast: Tensor
    spread_users: Spread
    spread_items: Spread


class Sampler:
    """Shuffles the training pairs anew each epoch and draws one contrast item per pair, on the device.

    Every draw depends on (seed, epoch) alone, so training can go on from any batch without a stored generator.
    """

    def __init__(
        self,
        users: Tensor,
        items: Tensor,
        n_items: int,
        *,
        batch_size: int,
        contrast: Contrast,
        dedup_pairs: bool,
        seed: int,
    ) -> None:
        """Take (E,) user and item indices; the device is theirs.

        Args:
            users, items: the training pairs.
            n_items: I.
            batch_size: pairs per batch.
            contrast: items to spread: not in the user's pairs (negative), the pairs' own (positive), any (uniform).
            dedup_pairs: whether repeated ids of a batch are gathered into counts.
            seed: of shuffling and drawing.

        Raises:
            ValueError: contrast is negative and some user has every item.
        """
        self.users, self.items, self.n_items = users, items, n_items
        self.batch_size, self.contrast, self.dedup_pairs, self.seed = batch_size, contrast, dedup_pairs, seed
        self.seen = torch.unique(users * n_items + items)
        if contrast == "negative":
            most, user = torch.bincount(self.seen // n_items).max(0)
            if most >= n_items:
                raise ValueError(f"user {int(user)} has interacted with all {n_items} items: no negative to sample")

    @property
    def n_batches(self) -> int:
        """Batches of an epoch, the last of which may be short."""
        return -(-len(self.users) // self.batch_size)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of epoch `number` from batch `first` on."""
        generator = torch.Generator(self.users.device).manual_seed(derived_seed(self.seed, number))
        order = torch.randperm(len(self.users), generator=generator, device=self.users.device)
        users, items = self.users[order], self.items[order]
        contrast = items if self.contrast == "positive" else self._draw(users, generator)
        parts = zip(
            users.split(self.batch_size),
            items.split(self.batch_size),
            contrast.split(self.batch_size),
            spreads(users, self.batch_size, self.dedup_pairs),
            spreads(contrast, self.batch_size, self.dedup_pairs),
            strict=True,
        )
        for part in itertools.islice(parts, first, None):
            yield Batch(*part)

    def _draw(self, users: Tensor, generator: torch.Generator) -> Tensor:
        drawn = self._uniform(len(users), generator)
        if self.contrast == "uniform":
            return drawn
        taken = torch.nonzero(self._is_seen(users, drawn)).squeeze(1)
        while len(taken):
            again = self._uniform(len(taken), generator)
            drawn[taken] = again
            taken = taken[self._is_seen(users[taken], again)]
        return drawn

    def _uniform(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.n_items, (n,), generator=generator, device=self.users.device)

    def _is_seen(self, users: Tensor, items: Tensor) -> Tensor:
        key = users * self.n_items + items
        place = torch.searchsorted(self.seen, key).clamp_max_(len(self.seen) - 1)
        return self.seen[place] == key


def spreads(ids: Tensor, batch_size: int, dedup_pairs: bool) -> list[Spread]:
    """Return what each batch of (E,) ids spreads. All batches are counted at once: one wait for the device per epoch."""
    if not dedup_pairs:
        return [Spread(part, None, torch.arange(len(part), device=ids.device)) for part in ids.split(batch_size)]
    n = int(ids.max()) + 1
    batch = torch.arange(len(ids), device=ids.device).div(batch_size, rounding_mode="floor")
    keys, places, counts = torch.unique(batch * n + ids, return_inverse=True, return_counts=True)
    found = torch.bincount(keys // n)
    places -= (found.cumsum(0) - found)[batch]
    sizes = found.tolist()
    parts = zip((keys % n).split(sizes), counts.split(sizes), places.split(batch_size), strict=True)
    return [Spread(*part) for part in parts]


def derived_seed(*parts: int) -> int:
    """Return a 63-bit seed that differs, and whose streams are independent, for different `parts`."""
    # The length goes in too: trailing zeros alone would not change the sequence.
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> 1)


def mixing_parameters(alpha: float, n: int, device: torch.device, seed: int) -> Tensor:
    """Draw t ~ Beta(alpha, alpha) for `n` items on `device`, by `seed`; the global generators are left as they were."""
    source = torch.device("cpu") if device.type == "mps" else device
    with torch.random.fork_rng(devices=[source] if source.type == "cuda" else []):
        # torch.manual_seed would seed the generators of all GPUs.
        (torch.cuda.manual_seed if source.type == "cuda" else torch.default_generator.manual_seed)(seed)
        shape = torch.full((n,), alpha, device=source)
        return torch.distributions.Beta(shape, shape, validate_args=False).sample().to(device)
