"""Batches of training pairs with the items that the uniformity loss spreads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Contrast = Literal["negative", "positive", "uniform"]


@dataclass(frozen=True)
class Batch:
    """Equal-length index vectors: a user, an item of theirs, and an item for the uniformity loss."""

    users: Tensor
    items: Tensor
    contrast: Tensor


class Sampler:
    """Shuffles the training pairs anew each epoch and draws one contrast item per pair, on the device.

    Every draw depends on (seed, epoch) alone, so training can go on from any batch without a stored generator.
    """

    def __init__(
        self, users: Tensor, items: Tensor, n_items: int, batch_size: int, contrast: Contrast, seed: int
    ) -> None:
        """Take (E,) user and item indices; the device is theirs.

        Raises:
            ValueError: contrast is negative and some user has every item.
        """
        self.users, self.items, self.n_items = users, items, n_items
        self.batch_size, self.contrast, self.seed = batch_size, contrast, seed
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
        contrast = None if self.contrast == "positive" else self._draw(users, generator)
        for start in range(first * self.batch_size, len(users), self.batch_size):
            part = slice(start, start + self.batch_size)
            own = items[part]
            yield Batch(users[part], own, own if contrast is None else contrast[part])

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


def derived_seed(*parts: int) -> int:
    """Return a 63-bit seed that differs, and whose streams are independent, for different `parts`."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def mixing_parameters(alpha: float, n: int, device: torch.device, seed: int) -> Tensor:
    """Draw t ~ Beta(alpha, alpha) for `n` items on `device`, by `seed`; the global generators are left as they were."""
    source = torch.device("cpu") if device.type == "mps" else device
    with torch.random.fork_rng(devices=[source] if source.type == "cuda" else []):
        torch.manual_seed(seed)
        shape = torch.full((n,), alpha, device=source)
        return torch.distributions.Beta(shape, shape, validate_args=False).sample().to(device)
