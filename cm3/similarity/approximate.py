"""Approximate nearest neighbours by cosine with faiss, rescored exactly, and their measured recall."""

import logging
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cm3.common.errors import UserError
from cm3.similarity.exact import UnitRows, knn

log = logging.getLogger(__name__)

SAMPLE = 1000
RECALL = 0.99
_MARGIN = 16
_LINKS = 32
_SEED = 0
_ROUNDING = 1e-5
_GAIN = 1e-3
_BLOCK_ROWS = 4096  # rows that faiss multiplies at a time, so that blocks have the sums of a whole


def approximate_knn(features: Tensor, k: int, method: str) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return (indices (N, k) int64, scores (N, k)) and facts of the search, all on the CPU.

    faiss returns k + 16 candidates of each row, to which the row itself is added; their scores and order are those of
    `cm3.similarity.exact.knn`. Rows with fewer than k candidates are searched exactly. The recall is the fraction of the
    returned neighbours of `SAMPLE` random rows that score at least as high as the exact k-th one, so any neighbours of a
    tie count. The breadth of the search is doubled until the candidates of these rows reach `RECALL`, a doubling gains
    nothing, or exact search would be faster; a recall that stays below is logged as a warning.

    The index is built from a fixed seed, in an order that no thread changes: a second run on the same machine and faiss gives the same result.
    On another kind of CPU the candidates may differ, their scores do not.

    Args:
        features: (N, d) float32.
        k: neighbours per row, itself included.
        method: "hnsw", a graph of 32 links a node (Malkov and Yashunin, arXiv 1603.09320), or "ivf", 4 sqrt(N) cells of
            spherical k-means, 8 or more of which are searched: as long as few suffice, work grows as N^1.5, not N^2.

    Returns:
        Indices, scores and {"recall", "recall_rows", "searched_exactly": rows, "breadth": cells, or nodes in the queue,
        per search of a row}.

    Raises:
        UserError: faiss is not installed.
        ValueError: fewer than k rows, a value that is not finite, or an unknown method.
    """
    n = len(features)
    if not 0 < k <= n:
        raise ValueError(f"k = {k} neighbours of {n} rows")
    features = features.cpu()
    unit_rows = UnitRows(features).check_finite()
    sample = torch.from_numpy(np.random.default_rng(_SEED).choice(n, min(n, SAMPLE), replace=False))
    _, exact = knn(features, k, rows=sample)
    unit = unit_rows.quantised(0)[0].numpy()
    found, breadth = faiss_candidates(_faiss(), unit, min(n, k + _MARGIN), method, sample.numpy(), exact.numpy())
    candidates = torch.from_numpy(found)
    candidates = torch.cat([torch.arange(n)[:, None], candidates], dim=1).sort(dim=1).values
    # -1 is an empty place; the row itself may occur twice.
    void = candidates < 0
    void[:, 1:] |= candidates[:, 1:] == candidates[:, :-1]
    rounded = unit_rows.rounded(unit_rows.cosines(torch.arange(n), candidates.clamp_(min=0)))
    scores, place = rounded.masked_fill_(void, -torch.inf).sort(dim=1, descending=True, stable=True)
    indices, scores = candidates.gather(1, place[:, :k]), scores[:, :k].contiguous()
    short = torch.nonzero(scores[:, -1] == -torch.inf).squeeze(1)
    if len(short):
        indices[short], scores[short] = knn(features, k, rows=short)
    recall = (scores[sample] >= exact[:, -1:]).double().mean().item()
    if recall < RECALL:
        log.warning("recall %.4f of %s at a breadth of %d; knn_method: exact finds all", recall, method, breadth)
    facts = {"recall": recall, "recall_rows": len(sample), "searched_exactly": len(short), "breadth": breadth}
    return indices, scores, facts


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError:
        raise UserError(
            "model.knn_method is approximate, which needs faiss: uv pip install faiss-cpu==1.15.1, or set it to exact"
        ) from None
    return faiss


def faiss_candidates(
    faiss: ModuleType, unit: np.ndarray, width: int, method: str, sample: np.ndarray, exact: np.ndarray
) -> tuple[np.ndarray, int]:
    """Return (N, width) int64 row numbers, -1 for an empty place, and the breadth of the search.

    `exact` (S, k) are the scores of the nearest neighbours of the rows `sample` (S,).
    """
    n, d = unit.shape
    if method == "hnsw":
        index = faiss.IndexHNSWFlat(d, _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 100
        chosen, name, breadth, most = index.hnsw, "efSearch", 2 * width, n
    elif method == "ivf":
        cells = min(n, int(4 * n**0.5))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.cp.spherical, index.cp.min_points_per_centroid = _SEED, True, 1
        index.cp.max_points_per_centroid = 64
        # Searching a sixteenth of the rows takes about as long as exact search, whose products are many times faster.
        chosen, name, breadth, most = index, "nprobe", 8, min(cells, max(64, cells // 16))
    else:
        raise ValueError(f"method {method!r} is neither hnsw nor ivf")
    threads = faiss.omp_get_max_threads()
    # With several threads the links of HNSW depend on timing, and the products of k-means on their number; a search
    # does not.
    faiss.omp_set_num_threads(1)
    try:
        index.train(unit)
        if method == "ivf":
            add_in_blocks(faiss, index, unit, torch.get_num_threads())
        else:
            index.add(unit)
        faiss.omp_set_num_threads(torch.get_num_threads())
        breadth, before = min(breadth, most), -1.0
        while True:
            setattr(chosen, name, breadth)
            scores = index.search(unit[sample], width)[0]
            recall = (scores >= exact[:, -1:] - _ROUNDING).sum(1).clip(max=exact.shape[1]).mean() / exact.shape[1]
            # A graph of HNSW can lack a path to some rows at any breadth.
            if recall >= RECALL or recall - before < _GAIN or breadth == most:
                break
            breadth, before = min(2 * breadth, most), recall
        found: np.ndarray = index.search(unit, width)[1]
        return found, breadth
    finally:
        faiss.omp_set_num_threads(threads)


def add_in_blocks(faiss: ModuleType, index: Any, unit: np.ndarray, threads: int) -> None:
    """Add the rows to an IVF index, their cells found block by block in threads; the index is that of `index.add`."""

    def cells_of(start: int) -> np.ndarray:
        faiss.omp_set_num_threads(1)  # of this thread alone: a product by several threads has other last digits
        found: np.ndarray = index.quantizer.search(unit[start : start + _BLOCK_ROWS], 1)[1]
        return found

    with ThreadPoolExecutor(threads) as pool:
        cells = np.concatenate(list(pool.map(cells_of, range(0, len(unit), _BLOCK_ROWS)))).ravel()
    index.add_core(len(unit), faiss.swig_ptr(unit), None, faiss.swig_ptr(cells))
