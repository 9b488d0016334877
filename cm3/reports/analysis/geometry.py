"""Alignment and uniformity of users and items on the unit sphere, from exported embeddings."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch.nn import functional

from cm3.model.losses import alignment
from cm3.model.pair_potential import tiled_uniformity

PAIRS, ROWS = 20_000, 4_000


@dataclass(frozen=True)
class EmbeddingSample:
    """Sampled training pairs, users and items, the same for every model.

    Attributes:
        pair_users, pair_items: (P,) users and items of distinct training pairs.
        users, items: (B,) indices of distinct rows that have training interactions.
    """

    pair_users: np.ndarray
    pair_items: np.ndarray
    users: np.ndarray
    items: np.ndarray

    def rows(self) -> tuple[np.ndarray, np.ndarray, "EmbeddingSample"]:
        """Return the distinct users and items, ascending, and the sample as positions among them."""
        users, items = np.union1d(self.pair_users, self.users), np.union1d(self.pair_items, self.items)
        sides = ((users, self.pair_users), (items, self.pair_items), (users, self.users), (items, self.items))
        return users, items, EmbeddingSample(*(np.searchsorted(known, rows) for known, rows in sides))


def draw_sample(train: sp.csr_matrix, seed: int, pairs: int = PAIRS, rows: int = ROWS) -> EmbeddingSample:
    """Draw at most `pairs` training pairs and `rows` users and items from a (U, I) matrix, without replacement.

    Users and items without training interactions are excluded: training may never have updated them.
    """
    rng = np.random.default_rng(seed)
    users, items = train.nonzero()
    chosen = np.sort(rng.permutation(len(users))[:pairs])
    known = [np.sort(rng.permutation(np.unique(side))[:rows]) for side in (users, items)]
    return EmbeddingSample(users[chosen], items[chosen], *known)


def measure(users: np.ndarray, items: np.ndarray, sample: EmbeddingSample) -> dict[str, float]:
    """Return alignment, uniformity_users and uniformity_items of (U, D) and (I, D) embeddings scaled to unit length.

    alignment = mean ||u - i||^2 over the sampled pairs; uniformity = log mean exp(-2 ||x - y||^2) over all pairs of
    the sampled rows. Lower is better for both.

    Source: Wang and Isola, Understanding contrastive representation learning (2020); for recommendation Wang et al.,
    Towards representation alignment and uniformity in collaborative filtering (2022).
    """

    def unit(vectors: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        return functional.normalize(torch.from_numpy(vectors[rows]).double(), dim=1)

    with torch.no_grad():
        return {
            "alignment": float(alignment(unit(users, sample.pair_users), unit(items, sample.pair_items))),
            "uniformity_users": float(tiled_uniformity(unit(users, sample.users))),
            "uniformity_items": float(tiled_uniformity(unit(items, sample.items))),
        }
