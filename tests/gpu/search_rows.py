"""Checks of exact neighbours and of ranking against the matrix products that they need at least."""

import numpy as np
import scipy.sparse as sp
import torch
from measure import DEVICE, TINY, Found, seconds

from cm3.evaluation.ranking import Ranking
from cm3.similarity.exact import knn

# The items of Amazon Clothing; users of an evaluation.
ROWS, WIDTHS, EVALUATED = (500, (16,), 300) if TINY else (63_001, (384, 4096), 200_000)


def neighbours(width: int) -> Found:
    """Ten exact neighbours of every row."""
    x = torch.randn(ROWS, width, device=DEVICE)
    unit = torch.nn.functional.normalize(x, dim=1)

    def floor() -> None:
        for part in unit.split(4096):
            part @ unit.T

    floor()
    knn(x[:2000], 10)
    return f"{seconds(lambda: knn(x, 10)):.2f} s", f"float32 product {seconds(floor):.2f} s"


def evaluation() -> Found:
    """Top 50 of all items for many users."""
    users, items = torch.randn(EVALUATED, 256, device=DEVICE), torch.randn(ROWS, 256, device=DEVICE)
    rng = np.random.default_rng(0)
    seen = rng.integers(0, ROWS, EVALUATED * 8).astype(np.int32)
    masked = sp.csr_matrix((np.ones(len(seen), np.float32), seen, np.arange(0, len(seen) + 1, 8)), (EVALUATED, ROWS))
    ranking = Ranking(np.arange(EVALUATED), masked, DEVICE)

    def floor() -> None:
        for part in users.split(1024):
            part @ items.T

    floor()
    return f"{seconds(lambda: ranking.top(users, items, 50)):.2f} s", f"float32 product {seconds(floor):.2f} s"
