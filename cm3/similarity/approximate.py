"""Approximate nearest neighbours by cosine, rescored exactly, and their measured recall."""

import logging

import numpy as np
import torch
from torch import Tensor

from cm3.similarity.exact import UnitRows, knn_in_blocks
from cm3.similarity.hnsw import Graph
from cm3.similarity.ivf import Cells
from cm3.similarity.workers import one_thread_each

log = logging.getLogger(__name__)

SAMPLE = 1000
RECALL = 0.99
_MARGIN = 16
_SEED = 0
_GAIN = 1e-3
_METHODS: dict[str, type[Cells | Graph]] = {"hnsw": Graph, "ivf": Cells}


def approximate_knn(features: Tensor, k: int, method: str) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return (indices (N, k) int64, scores (N, k)) and facts of the search, all on the CPU.

    A search returns k + 16 candidates of each row, to which the row itself is added; their scores and order are those of
    `cm3.similarity.exact.knn`. Rows with fewer than k candidates are searched exactly. The recall is the fraction of the
    returned neighbours of `SAMPLE` random rows that score at least as high as the exact k-th one, so any neighbours of a
    tie count. The breadth of the search is doubled until the candidates of these rows reach `RECALL`, a doubling gains
    nothing, or exact search would be about as fast; a recall that stays below is logged as a warning.

    The result is the same for any number of threads, and for each run on the same kind of machine. On another kind of CPU
    the candidates may differ, their scores do not.

    Args:
        features: (N, d) float32.
        k: neighbours per row, itself included.
        method: "hnsw", a graph by faiss of 32 links a node (`cm3.similarity.hnsw`), or "ivf", 4 sqrt(N) cells of spherical
            k-means, 8 or more of which are searched (`cm3.similarity.ivf`): as long as few suffice, work grows as N^1.5,
            not N^2.

    Returns:
        Indices, scores and {"recall", "recall_rows", "searched_exactly": rows, "breadth": cells, or nodes in the queue,
        per search of a row}.

    Raises:
        UserError: method hnsw, and faiss is not installed.
        ValueError: fewer than k rows, a value that is not finite, or an unknown method.
    """
    n = len(features)
    if not 0 < k <= n:
        raise ValueError(f"k = {k} neighbours of {n} rows")
    if method not in _METHODS:
        raise ValueError(f"method {method!r} is neither hnsw nor ivf")
    features = features.cpu()
    unit_rows = UnitRows(features).check_finite()
    sample = torch.from_numpy(np.random.default_rng(_SEED).choice(n, min(n, SAMPLE), replace=False))
    nearest, exact = knn_in_blocks(features, k, sample)
    indices, scores = torch.empty((n, k), dtype=torch.int64), torch.empty((n, k), dtype=unit_rows.dtype)

    def rescore(rows: Tensor) -> None:
        indices[rows], scores[rows] = rescored(unit_rows, rows, search.candidates(rows), k)

    with one_thread_each() as pool:
        search = _METHODS[method](unit_rows, min(n, k + _MARGIN), pool)
        search.widen(sample, nearest, exact, RECALL, _GAIN)
        list(pool.map(rescore, search.parts()))
    short = torch.nonzero(scores[:, -1] == -torch.inf).squeeze(1)
    if len(short):
        indices[short], scores[short] = knn_in_blocks(features, k, short)
    recall = (scores[sample] >= exact[:, -1:]).double().mean().item()
    if recall < RECALL:
        log.warning("recall %.4f of %s at a breadth of %d; knn_method: exact finds all", recall, method, search.breadth)
    facts = {"recall": recall, "recall_rows": len(sample), "searched_exactly": len(short), "breadth": search.breadth}
    return indices, scores, facts


def rescored(unit_rows: UnitRows, rows: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return indices and exact scores (R, k) of the best of `rows` (R,) and their candidates (R, W), -1 in empty places.

    A row with fewer than k candidates has scores of -inf.
    """
    indices = torch.empty((len(rows), k), dtype=torch.int64)
    scores = torch.empty((len(rows), k), dtype=unit_rows.dtype)
    for here in torch.arange(len(rows)).split(8192):
        some = torch.cat([rows[here, None], candidates[here]], dim=1).sort(dim=1).values
        # -1 is an empty place; the row itself may occur twice.
        void = some < 0
        void[:, 1:] |= some[:, 1:] == some[:, :-1]
        rounded = unit_rows.rounded(unit_rows.cosines(rows[here], some.clamp_(min=0)))
        ranked, place = rounded.masked_fill_(void, -torch.inf).sort(dim=1, descending=True, stable=True)
        indices[here], scores[here] = some.gather(1, place[:, :k]), ranked[:, :k]
    return indices, scores
