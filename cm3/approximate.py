"""Approximate nearest neighbours by cosine with faiss, rescored exactly, and how good they are."""

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from cm3.neighbours import Directions, knn
from stages.errors import UserError

SAMPLE = 1000
_MARGIN = 16
_LINKS = 32
_SEED = 0


def approximate_knn(features: Tensor, k: int, method: str) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return (indices (N, k) int64, scores (N, k)) and {"recall", "recall_rows"}, all on the CPU.

    faiss names k + 16 candidates of each row, and the row itself is always one; their scores and order are those of
    `cm3.neighbours.knn`. Rows for which it finds fewer than k are searched exactly. The recall is the share of the
    returned neighbours of `SAMPLE` random rows that score at least as high as the exact k-th one, so that any of a
    tie will do.

    The index is built by one thread from a fixed seed: a second run on the same machine and faiss gives the same. On
    another kind of CPU the candidates may differ, their scores never.

    Args:
        features: (N, d) float32.
        k: neighbours per row, itself included.
        method: "hnsw", a graph of 32 links a node (Malkov and Yashunin, arXiv 1603.09320), or "ivf", sqrt(N) cells of
            spherical k-means of which an eighth is searched.

    Raises:
        UserError: faiss is not installed.
        ValueError: fewer than k rows, a value that is not finite, or an unknown method.
    """
    n = len(features)
    if not 0 < k <= n:
        raise ValueError(f"k = {k} neighbours of {n} rows")
    features = features.cpu()
    space = Directions(features)
    candidates = torch.from_numpy(_candidates(_faiss(), space.rough(0)[0].numpy(), min(n, k + _MARGIN), method))
    candidates = torch.cat([torch.arange(n)[:, None], candidates], dim=1).sort(dim=1).values
    # -1 stands where faiss found nothing; the row itself may stand there twice.
    void = candidates < 0
    void[:, 1:] |= candidates[:, 1:] == candidates[:, :-1]
    settled = space.settled(space.cosines(torch.arange(n), candidates.clamp_(min=0)))
    scores, place = settled.masked_fill_(void, -torch.inf).sort(dim=1, descending=True, stable=True)
    indices, scores = candidates.gather(1, place[:, :k]), scores[:, :k].contiguous()
    short = torch.nonzero(scores[:, -1] == -torch.inf).squeeze(1)
    if len(short):
        indices[short], scores[short] = knn(features, k, rows=short)
    sample = torch.from_numpy(np.random.default_rng(_SEED).choice(n, min(n, SAMPLE), replace=False))
    _, exact = knn(features, k, rows=sample)
    recall = (scores[sample] >= exact[:, -1:]).double().mean().item()
    return indices, scores, {"recall": recall, "recall_rows": len(sample), "searched_exactly": len(short)}


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError:
        raise UserError(
            "model.knn_method is approximate, which needs faiss: uv pip install faiss-cpu==1.15.1, or set it to exact"
        ) from None
    return faiss


def _candidates(faiss: ModuleType, unit: np.ndarray, width: int, method: str) -> np.ndarray:
    """Return (N, width) int64 row numbers, -1 where nothing was found."""
    n, d = unit.shape
    if method == "hnsw":
        index = faiss.IndexHNSWFlat(d, _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 100, max(128, 2 * width)
    elif method == "ivf":
        cells = max(1, int(n**0.5))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.cp.spherical, index.cp.min_points_per_centroid = _SEED, True, 1
        index.nprobe = max(8, cells // 8)
    else:
        raise ValueError(f"method {method!r} is neither hnsw nor ivf")
    threads = faiss.omp_get_max_threads()
    # Threads race for the links of HNSW and add up k-means in any order; a search answers each row on its own.
    faiss.omp_set_num_threads(1)
    try:
        index.train(unit)
        index.add(unit)
        faiss.omp_set_num_threads(torch.get_num_threads())
        found: np.ndarray = index.search(unit, width)[1]
        return found
    finally:
        faiss.omp_set_num_threads(threads)
