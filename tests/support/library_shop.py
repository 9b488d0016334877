"""A small shop of two tastes, for tests of the library."""

import numpy as np

SMALL = {"embedding_dim": 8, "knn_k": 4}
QUICK = {"epochs": 40, "batch_size": 128, "lr": 0.02, "device": "cpu", "patience": 40}


def shop(seed: int = 0) -> tuple[dict[str, list[str]], dict[str, np.ndarray], list[str]]:
    """Two tastes: users of a group buy its items alone, features tell the groups apart; the last item is cold."""
    rng = np.random.default_rng(seed)
    items = [f"i{n}" for n in range(41)]
    group = np.arange(41) % 2
    users, bought = [], []
    for user in range(60):
        mine = rng.choice(np.flatnonzero(group[:40] == user % 2), 8, replace=False)
        users += [f"u{user}"] * 8
        bought += [items[item] for item in mine]
    centres = rng.normal(size=(2, 6))
    features = {"text": centres[group] + 0.1 * rng.normal(size=(41, 6)), "image": rng.normal(size=(41, 5))}
    return {"user": users, "item": bought}, features, items
