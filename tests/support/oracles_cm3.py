"""Plain float64 recomputations of CM3's formulas, and small data sets in the pipeline's table formats."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import torch

from cm3.common.features import write_features
from cm3.common.tables import INTERACTIONS, ITEMS, SPLITS, USERS, write_table


def unit_rows(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Textbook form, one pair of vectors."""
    w = math.acos(max(-1.0, min(1.0, float(a @ b))))
    return math.sin((1 - t) * w) / math.sin(w) * a + math.sin(t * w) / math.sin(w) * b


def bezier(points: Sequence[np.ndarray], t: float) -> np.ndarray:
    if len(points) == 1:
        return points[0]
    return slerp(bezier(points[:-1], t), bezier(points[1:], t), t)


def log_mean_potential(
    x: np.ndarray, similarity: np.ndarray | None = None, t: float = 2.0, ids: np.ndarray | None = None
) -> float:
    values = []
    for a in range(len(x)):
        for b in range(a + 1, len(x)):
            if ids is not None and ids[a] == ids[b]:
                continue
            distance = float(((x[a] - x[b]) ** 2).sum())
            values.append(math.exp(-t * (distance if similarity is None else distance - 2 + 2 * similarity[a, b])))
    return math.log(sum(values) / len(values)) if values else 0.0


def ranked(scores: np.ndarray, masked: set[int], k: int) -> list[int]:
    order = sorted((i for i in range(len(scores)) if i not in masked), key=lambda i: (-scores[i], i))[:k]
    return order + [-1] * (k - len(order))


def metrics_of(recommended: Sequence[int], truth: set[int], k: int) -> dict[str, float]:
    hits = [item in truth for item in recommended[:k]]
    if not truth:
        return dict.fromkeys(("recall", "ndcg", "precision", "map", "hitrate", "mrr"), 0.0)
    gain = sum(1 / math.log2(rank + 1) for rank, hit in enumerate(hits, 1) if hit)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(truth)) + 1))
    precision_at_hits = [sum(hits[:rank]) / rank for rank, hit in enumerate(hits, 1) if hit]
    return {
        "recall": sum(hits) / len(truth),
        "ndcg": gain / ideal,
        "precision": sum(hits) / k,
        "map": sum(precision_at_hits) / min(k, len(truth)),
        "hitrate": float(any(hits)),
        "mrr": 1 / (hits.index(True) + 1) if any(hits) else 0.0,
    }


def dense_adjacency(interactions: np.ndarray) -> np.ndarray:
    """Symmetric-normalised bipartite adjacency of a (U, I) 0/1 matrix."""
    n_users, n_items = interactions.shape
    a = np.zeros((n_users + n_items, n_users + n_items))
    a[:n_users, n_users:] = interactions
    a[n_users:, :n_users] = interactions.T
    degree = a.sum(1)
    scale = np.array([1 / math.sqrt(d) if d else 0.0 for d in degree])
    return scale[:, None] * a * scale[None, :]


def plain_forward(
    weights: dict[str, torch.Tensor],
    features: Sequence[torch.Tensor],
    adjacency: torch.Tensor,
    item_graph: torch.Tensor,
    t: torch.Tensor,
    n_ui_layers: int,
    n_mm_layers: int,
    fusion: str = "bezier",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """CM3's forward with dense matrices, explicit powers and an item loop; differentiable by torch alone.

    `n_mm_layers` below 0 leaves the item graph out.
    """

    def normalise(x: torch.Tensor) -> torch.Tensor:
        return x / (x * x).sum(-1, keepdim=True).sqrt()

    def between(a: torch.Tensor, b: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        if fusion == "linear":
            return (1 - at) * a + at * b
        w = torch.arccos((a * b).sum())
        return (torch.sin((1 - at) * w) * a + torch.sin(at * w) * b) / torch.sin(w)

    streams, points = [], []
    for m, x in enumerate(features):
        inner = x @ weights[f"modalities.{m}.hidden.weight"].T + weights[f"modalities.{m}.hidden.bias"]
        inner = torch.where(inner > 0, inner, 0.01 * inner)
        streams.append(normalise(inner @ weights[f"modalities.{m}.output.weight"].T))
        points.append(normalise(x @ weights[f"modalities.{m}.point.weight"].T + weights[f"modalities.{m}.point.bias"]))
    fused = []
    for i in range(len(t)):
        curve = [p[i] for p in points]
        if fusion == "mean":
            curve = [sum(curve, torch.zeros_like(curve[0]))]
        elif fusion == "concat":
            curve = [weights["mix.weight"] @ torch.cat(curve) + weights["mix.bias"]]
        while len(curve) > 1:
            curve = [between(a, b, t[i]) for a, b in itertools.pairwise(curve)]
        fused.append(curve[0] if fusion == "bezier" else normalise(curve[0]))
    mixed = torch.stack(fused)
    n_users = len(weights["users"])
    ego = torch.cat([normalise(weights["users"]).reshape(n_users, -1), torch.cat([*streams, mixed], 1)])
    nodes = sum((torch.linalg.matrix_power(adjacency, layer) @ ego for layer in range(n_ui_layers + 1)), ego * 0)
    d = weights["users"].shape[2]
    share = weights["stream_logits"].softmax(1).repeat_interleave(d, dim=1)
    items = nodes[n_users:]
    spread = torch.linalg.matrix_power(item_graph, n_mm_layers) @ items if n_mm_layers >= 0 else torch.zeros_like(items)
    return nodes[:n_users] * share, items + spread, mixed


def plain_loss(
    users: torch.Tensor,
    items: torch.Tensor,
    fused: torch.Tensor,
    batch: tuple[Sequence[int], Sequence[int], Sequence[int]],
    gamma: float,
    clamp: tuple[float, float],
    dedup: bool,
    detach: bool,
    calibration: bool = True,
) -> torch.Tensor:
    def normalise(x: torch.Tensor) -> torch.Tensor:
        return x / (x * x).sum().sqrt()

    def potential(rows: Sequence[int], table: torch.Tensor, calibrated: bool) -> torch.Tensor:
        terms = []
        for a in range(len(rows)):
            for b in range(a + 1, len(rows)):
                if dedup and rows[a] == rows[b]:
                    continue
                exponent = ((normalise(table[rows[a]]) - normalise(table[rows[b]])) ** 2).sum()
                if calibrated:
                    cosine = (fused[rows[a]] * fused[rows[b]]).sum()
                    cosine = cosine.detach() if detach else cosine
                    exponent = exponent - 2 + 2 * cosine.clamp(*clamp)
                terms.append((-2 * exponent).exp())
        return torch.stack(terms).mean().log()

    pairs = zip(batch[0], batch[1], strict=True)
    align = torch.stack([((normalise(users[u]) - normalise(items[i])) ** 2).sum() for u, i in pairs]).mean()
    return align + gamma * (potential(batch[0], users, False) + potential(batch[2], items, calibration)) / 2


def write_shop(
    folder: Path,
    n_users: int = 40,
    n_items: int = 30,
    per_user: int = 8,
    modalities: Sequence[str] = ("text", "image"),
    missing: dict[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> dict[str, Path]:
    """Write a small data set whose users buy what lies near their taste; return the paths by input name."""
    rng = np.random.default_rng(seed)
    taste, kind = rng.standard_normal((n_users, 4)), rng.standard_normal((n_items, 4))
    users = np.repeat(np.arange(n_users), per_user)
    noisy = taste @ kind.T + rng.gumbel(size=(n_users, n_items))
    # The last item is bought by no one: cold.
    items = np.argsort(-noisy[:, : n_items - 1], axis=1)[:, :per_user].ravel()
    split = np.tile(np.array([0] * (per_user - 2) + [1, 2], np.int8), n_users)
    paths = write_interactions(folder, users, items, split, n_users, n_items)
    ids = [f"item{i}" for i in range(n_items)]
    for number, modality in enumerate(modalities):
        vectors = kind @ rng.standard_normal((4, 6 + number)) + 0.1 * rng.standard_normal((n_items, 6 + number))
        status = np.array(["ok"] * n_items, dtype=object)
        status[list((missing or {}).get(modality, []))] = "missing"
        path = paths[f"features.{modality}"] = folder / f"{modality}.parquet"
        write_features(path, ids, vectors.astype(np.float32), status.tolist(), {"model": modality})
    return paths


def write_interactions(
    folder: Path,
    users: np.ndarray,
    items: np.ndarray,
    split: np.ndarray,
    n_users: int,
    n_items: int,
    user_ids: Sequence[str] | None = None,
    item_ids: Sequence[str] | None = None,
) -> dict[str, Path]:
    paths = {name: folder / f"{name}.parquet" for name in ("interactions", "items", "users")}
    user_ids = user_ids or [f"user{u}" for u in range(n_users)]
    texts = item_ids or [f"item{i}" for i in range(n_items)]
    labels = pa.DictionaryArray.from_arrays(pa.array(split, pa.int8()), pa.array(list(SPLITS)))
    n = len(users)
    table = pa.table(
        {
            "user": pa.array(users, pa.int32()),
            "item": pa.array(items, pa.int32()),
            "rating": pa.array(np.ones(n), pa.float32()),
            "timestamp": pa.array(np.arange(n), pa.int64()),
            "split": labels,
        }
    )
    write_table(paths["interactions"], table, INTERACTIONS)
    user_table = {"user": pa.array(range(n_users), pa.int32()), "user_id": user_ids}
    write_table(paths["users"], pa.table(user_table), USERS)
    empty = pa.array([[]] * n_items, pa.list_(pa.string()))
    item_table = {"item": pa.array(range(n_items), pa.int32()), "item_id": texts, "title": texts, "brand": texts}
    item_table |= {"categories": empty, "description": texts, "features": empty, "details": empty}
    item_table |= {"price": [None] * len(texts), "sales_rank": [None] * len(texts), "image_urls": empty}
    write_table(paths["items"], pa.table(item_table), ITEMS)
    return paths


def csr(rows: Sequence[Sequence[int]], n_items: int) -> sp.csr_matrix:
    """A 0/1 matrix from the column indices of each row."""
    matrix = sp.lil_matrix((len(rows), n_items))
    for row, columns in enumerate(rows):
        matrix[row, list(columns)] = 1
    return matrix.tocsr()
