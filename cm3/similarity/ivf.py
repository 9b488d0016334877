"""Inverted file (IVF): rows in cells of spherical k-means, of which a search reads the few nearest to a row.

Libraries search row by row, and read the rows of several cells from memory for each. Here all rows are searched at once,
cell by cell: one matrix product of a cell's rows with all rows that search the cell.
"""

from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor

from cm3.common.topk import largest
from cm3.similarity.exact import UnitRows

BREADTH = 8
"""Cells of a search to begin with."""

_SEED = 0
_STEPS = 12  # of k-means
_POINTS = 64  # rows of a step per cell: 256,000 of a million rows
_BLOCK = 1024  # rows whose products with the centroids are computed at a time
_PART, _PARTS, _PAIRS = 2**17, 8, 2**22  # at most so many rows a part; at least so many parts; pairs of row and cell
_ROWS = 2048  # on each side of one matrix product, at most
ENTRIES = 2**21
"""Numbers in the rows on each side of one matrix product, at most."""


class Cells:
    """Row numbers by cell, and the centroids.

    Attributes:
        breadth: cells of a search.
        centroids: (C, d) float32, of unit length.
        cell_of: (N,) the cell of each row.

    Args:
        unit_rows: the rows (N, d), on the CPU.
        width: candidates per row.
        pool: threads of `cm3.similarity.workers`.
    """

    def __init__(self, unit_rows: UnitRows, width: int, pool: Executor) -> None:
        n = unit_rows.shape[0]
        self.unit_rows, self.width, self.breadth = unit_rows, width, BREADTH
        self.count = min(n, int(4 * n**0.5))
        self.centroids = spherical_kmeans(unit_rows, self.count, pool)
        self.cell_of = assign(unit_rows, torch.arange(n), self.centroids, pool)
        self.rows, self.starts = grouped(self.cell_of, self.count)

    def widen(self, sample: Tensor, nearest: Tensor, scores: Tensor, wanted: float, gain: float) -> None:
        """Double the breadth until searches find `wanted` of the neighbours of a sample, or a doubling gains too little.

        Args:
            sample: (S,) row numbers.
            nearest: (S, k) their exact nearest neighbours.
            scores: (S, k) the scores of these, not used.
            wanted: fraction to find.
            gain: of this fraction, by a doubling.
        """
        products = products_with(self.unit_rows.single(sample), self.centroids)
        of_neighbours = products.gather(1, self.cell_of[nearest])
        ranks = torch.stack([(products > one[:, None]).sum(dim=1) for one in of_neighbours.T])
        # Beyond a quarter of the cells, the exact search is nearly as fast.
        most = min(self.count, max(64, self.count // 4))
        breadth, before = min(self.breadth, most), -1.0
        while (
            (found := (ranks < breadth).double().mean().item()) < wanted and found - before >= gain and breadth < most
        ):
            breadth, before = min(2 * breadth, most), found
        self.breadth = breadth

    def parts(self) -> list[Tensor]:
        """Return all row numbers in parts, to be searched independently. Rows of a cell are in one part or in consecutive ones."""
        n = len(self.rows)
        return list(self.rows.split(max(1, min(_PART, -(-n // _PARTS), _PAIRS // self.breadth))))

    def candidates(self, rows: Tensor) -> Tensor:
        """Return the nearest rows (R, width) int64 of `rows` (R,) in their nearest cells; -1 in empty places."""
        nearest = torch.empty((len(rows), self.breadth), dtype=torch.int64)
        for part, found in zip(rows.split(_BLOCK), nearest.split(_BLOCK), strict=True):
            nearest_cells(self.unit_rows, part, self.centroids, found)
        best = _Best(len(rows), self.width)
        # The nearest cell first: after it, most rows of other cells are known to be too far.
        for ranks in (nearest[:, :1], nearest[:, 1:]):
            if ranks.shape[1]:
                pairs, starts = grouped(ranks.flatten(), self.count)
                self._search(rows, pairs.div_(ranks.shape[1], rounding_mode="floor"), starts, best)
        return best.indices

    def _search(self, rows: Tensor, searching: Tensor, starts: list[int], best: "_Best") -> None:
        size = max(1, min(_ROWS, ENTRIES // max(1, self.unit_rows.shape[1])))
        for cell in range(self.count):
            here = searching[starts[cell] : starts[cell + 1]]
            for members in self.rows[self.starts[cell] : self.starts[cell + 1]].split(size) if len(here) else ():
                others = self.unit_rows.single(members).T
                for some in here.split(size):
                    best.add(some, members, self.unit_rows.single(rows[some]) @ others)


class _Best:
    """The largest products of each of R rows so far, in no order."""

    def __init__(self, rows: int, width: int) -> None:
        self.values = torch.full((rows, width), -torch.inf)
        self.indices = torch.full((rows, width), -1)
        self.least = torch.full((rows,), -torch.inf)

    def add(self, rows: Tensor, columns: Tensor, products: Tensor) -> None:
        """Add the products (R, C) of some rows (R,) with the rows numbered `columns` (C,)."""
        if not len(columns):
            return
        width = self.values.shape[1]
        larger = torch.nonzero(products.amax(dim=1) > self.least[rows]).squeeze(1)
        if not len(larger):
            return
        rows = rows[larger]
        values, places = largest(products[larger], min(width, len(columns)))
        values, places = (
            torch.cat([self.values[rows], values], dim=1),
            torch.cat([self.indices[rows], columns[places]], dim=1),
        )
        values, kept = values.topk(width, dim=1, sorted=False)
        self.values[rows], self.indices[rows] = values, places.gather(1, kept)
        self.least[rows] = values.amin(dim=1)


def spherical_kmeans(unit_rows: UnitRows, count: int, pool: Executor) -> Tensor:
    """Return `count` unit centroids (count, d), the same for any number of threads.

    Centroids start as random rows. Each step takes other rows: with the same in each, a row that is far from all centroids
    stays in the cell whose centroid it is a part of, apart from rows like it, and many more cells have to be searched. A
    cell without rows starts again at a random one.
    """
    rng = np.random.default_rng(_SEED)
    n = unit_rows.shape[0]
    shuffled = torch.from_numpy(rng.permutation(n))
    centroids = unit_rows.single(shuffled[:count])
    size = min(n, _POINTS * count)
    for step in range(_STEPS):
        rows = shuffled if size == n else shuffled.roll(-step * size)[:size]
        order, starts = grouped(assign(unit_rows, rows, centroids, pool), count)
        centroids = unit_rows.sums(rows[order], torch.tensor(starts[:-1]))
        empty = torch.tensor(starts).diff() == 0
        centroids[empty] = unit_rows.single(rows[torch.from_numpy(rng.choice(size, int(empty.sum())))])
        centroids /= centroids.norm(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    return centroids


def assign(unit_rows: UnitRows, rows: Tensor, centroids: Tensor, pool: Executor) -> Tensor:
    """Return the nearest centroid (R,) int64 of `rows` (R,)."""
    found = torch.empty((len(rows), 1), dtype=torch.int64)
    blocks = rows.split(_BLOCK), found.split(_BLOCK)
    list(pool.map(lambda part, cells: nearest_cells(unit_rows, part, centroids, cells), *blocks))
    return found.squeeze(1)


def nearest_cells(unit_rows: UnitRows, rows: Tensor, centroids: Tensor, found: Tensor) -> None:
    """Write the nearest centroids of `rows` (R,) into `found` (R, breadth) int64, the nearest first.

    Results that each block allocated between its temporary products would keep the C library from using their memory again.
    """
    products = products_with(unit_rows.single(rows), centroids)
    breadth = found.shape[1]
    if breadth == 1:
        torch.argmax(products, dim=1, keepdim=True, out=found)
    else:
        values, places = largest(products, breadth)
        torch.gather(places, 1, values.argsort(dim=1, descending=True), out=found)


def products_with(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Return vectors (R, d) times centroids (C, d), (R, C) float32; in bfloat16 where the CPU multiplies it much faster."""
    if torch.cpu.get_capabilities().get("avx512_bf16"):
        return (vectors.bfloat16() @ centroids.bfloat16().T).float()
    return vectors @ centroids.T


def grouped(cells: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Return places (R,) in the order of their cells (R,), and the start of each of `count` cells with the end of the last."""
    sizes = torch.bincount(cells, minlength=count)
    kind = np.uint16 if count <= 2**16 else np.int64  # numpy sorts 16 bits by radix
    order = torch.from_numpy(np.argsort(cells.numpy().astype(kind), kind="stable"))
    return order, [0, *sizes.cumsum(0).tolist()]
