"""A shop of seven users and six items, networks of width 4 on it, and dense recomputations of their parts in float64."""

import math

import numpy as np
import oracles_cm3 as oracle
import scipy.sparse as sp
import torch

from cm3.baselines.inputs import Inputs
from cm3.model.sampling import Batch, CountedIds

USERS, ITEMS, D = 7, 6, 4
PAIRS = ([0, 1, 2, 2, 6, 0], [0, 1, 0, 5, 4, 0])
OTHERS = [3, 3, 4, 1, 0, 2]


def interactions() -> np.ndarray:
    x = (np.random.default_rng(0).random((USERS, ITEMS)) < 0.4).astype(float)
    x[PAIRS] = 1
    x[:, 3] = x[4] = 0  # a cold item and a cold user
    return x


def inputs() -> Inputs:
    rng = np.random.default_rng(1)
    features = {m: rng.standard_normal((ITEMS, width)).astype(np.float32) for m, width in (("text", 5), ("image", 3))}
    near = {m: neighbours(x) for m, x in features.items()}
    return Inputs(sp.csr_matrix(interactions(), dtype=np.float32), features, near, {"text": 0.9, "image": 0.1})


def neighbours(x: np.ndarray, k: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cosines = oracle.unit_rows(x.astype(float)) @ oracle.unit_rows(x.astype(float)).T
    others = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    items = np.repeat(np.arange(ITEMS), k)
    return items, others.ravel(), cosines[items, others.ravel()].astype(np.float32)


def batch() -> Batch:
    users, items = (torch.tensor(ids) for ids in PAIRS)
    places = torch.arange(len(users))
    return Batch(users, items, torch.tensor(OTHERS), CountedIds(users, None, places), CountedIds(items, None, places))


def made(settings):
    """Return a network in float64 whose parameters are far from their small initial values, and those in NumPy."""
    torch.manual_seed(3)
    network = settings.network(inputs()).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return network, {name: p.detach().numpy() for name, p in network.named_parameters()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bpr(users: np.ndarray, items: np.ndarray) -> float:
    terms = [
        -math.log(sigmoid(users[u] @ items[i] - users[u] @ items[j])) for u, i, j in zip(*PAIRS, OTHERS, strict=True)
    ]
    return float(np.mean(terms))


def half_squares(users: np.ndarray, items: np.ndarray) -> float:
    rows = [
        users[u] @ users[u] + items[i] @ items[i] + items[j] @ items[j] for u, i, j in zip(*PAIRS, OTHERS, strict=True)
    ]
    return sum(rows) / 2 / len(rows)


def layered(p, layers: int, x: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    a = oracle.dense_adjacency(interactions() if x is None else x)
    ego = np.concatenate([p["users"], p["items"]])
    nodes = sum(np.linalg.matrix_power(a, layer) @ ego for layer in range(layers + 1)) / (layers + 1)
    return nodes[:USERS], nodes[USERS:]


def same(found: torch.Tensor, expected, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


def linear(p, name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def projected(p, m: int) -> np.ndarray:
    features = list(inputs().features.values())[m].astype(float)
    return linear(p, f"modalities.{m}.linear", features)
