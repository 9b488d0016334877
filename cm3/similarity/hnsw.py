"""HNSW: a graph of rows that a search walks (Malkov and Yashunin, arXiv 1603.09320), by faiss."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from cm3.common.errors import UserError
from cm3.similarity.exact import UnitRows

_LINKS = 32
_QUEUE = 100  # rows that are considered while a row is linked
_ROUNDING = 1e-5
_BLOCK, _SAMPLE_BLOCK = 8192, 64


class Graph:
    """A graph of 32 links a node.

    Attributes:
        breadth: nodes in the queue of a search.

    Args:
        unit_rows: the rows (N, d), on the CPU.
        width: candidates per row.
        pool: threads of `cm3.similarity.workers`.

    Raises:
        UserError: faiss is not installed.
    """

    def __init__(self, unit_rows: UnitRows, width: int, pool: Executor) -> None:
        self._pool = pool
        self._faiss, (self._n, d) = _import_faiss(), unit_rows.shape
        self._width, self.breadth = width, min(2 * width, self._n)
        self._unit = unit_rows.quantised(0)[0].numpy()
        self._index = self._faiss.IndexHNSWFlat(d, _LINKS, self._faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = _QUEUE
        with _one_thread(self._faiss):  # with several, the links depend on timing
            self._index.add(self._unit)

    def widen(self, sample: Tensor, nearest: Tensor, scores: Tensor, wanted: float, gain: float) -> None:
        """Double the breadth until searches find `wanted` of the neighbours of a sample, or a doubling gains too little.

        A graph can lack a path to some rows at any breadth.

        Args:
            sample: (S,) row numbers.
            nearest: (S, k) their exact nearest neighbours.
            scores: (S, k) the scores of these.
            wanted: fraction to find.
            gain: of this fraction, by a doubling.
        """
        k, before = nearest.shape[1], -1.0
        least = scores[:, -1:].numpy() - _ROUNDING
        while True:
            best = np.concatenate([found for found, _ in self._pool.map(self._search, sample.split(_SAMPLE_BLOCK))])
            found = (best >= least).sum(1).clip(max=k).mean() / k
            if found >= wanted or found - before < gain or self.breadth == self._n:
                return
            self.breadth, before = min(2 * self.breadth, self._n), found

    def parts(self) -> list[Tensor]:
        """Return all row numbers in parts."""
        return list(torch.arange(self._n).split(_BLOCK))

    def candidates(self, rows: Tensor) -> Tensor:
        """Return the nearest rows (R, width) int64 that were found of `rows` (R,); -1 in empty places."""
        return torch.from_numpy(self._search(rows)[1])

    def _search(self, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        self._index.hnsw.efSearch = self.breadth
        with _one_thread(self._faiss):
            found: tuple[np.ndarray, np.ndarray] = self._index.search(self._unit[rows.numpy()], self._width)
        return found


@contextlib.contextmanager
def _one_thread(faiss: ModuleType) -> Iterator[None]:
    """Let faiss compute with one thread in the body; holds for the calling thread."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _import_faiss() -> ModuleType:
    try:
        import faiss
    except ImportError:
        raise UserError(
            "model.knn_method = 'hnsw' needs faiss: uv pip install faiss-cpu==1.15.1, or set it to exact, or to ivf, which "
            "is approximate and needs no other library"
        ) from None
    return faiss
