"""Principal component analysis of feature vectors: fitted and applied by blocks of rows, in float64.

The axes are the eigenvectors of the covariance matrix (d, d), which is summed over blocks, so that memory does not grow with
the number of vectors. Products run in Python threads of one BLAS thread each and are summed in a fixed order: the result does
not depend on the number of threads.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from cm3.common.arrays import blocks, mean_of_rows, zeros
from cm3.common.tensors import read_tensors, write_tensors

BLOCK = 1024
"""Rows per block; results depend on it, in their last digits."""

TILE = 512
"""Columns of a tile of the covariance matrix, which one thread computes."""


@dataclass(frozen=True)
class Projection:
    """The projection of vectors of d numbers onto their k first principal axes.

    Attributes:
        axes: (k, d) float64, orthonormal rows, of descending variance; the largest number of each row is positive.
        mean: (d,) float64, of the vectors that it was fitted to.
        variances: (k,) float64, of these vectors along the axes.
        total_variance: () float64, of these vectors, summed over all d directions.
    """

    axes: Tensor
    mean: Tensor
    variances: Tensor
    total_variance: Tensor

    @property
    def explained_variance(self) -> float:
        """The share of the variance that the axes keep, between 0 and 1."""
        return float(self.variances.sum() / self.total_variance) if self.total_variance > 0 else 1.0

    def project(self, x: np.ndarray, threads: int | None = None) -> np.ndarray:
        """Return the coordinates of vectors (N, d) along the axes, (N, k) float32; rows with NaN give NaN.

        The mean is not subtracted first, as `sklearn.decomposition.PCA` does: it only adds the same vector to all rows,
        which a model's affine maps can undo, whereas cosines between items would change much more.
        """
        found = zeros((len(x), len(self.axes)))

        def project(rows: slice) -> None:
            found[rows] = (torch.from_numpy(x[rows]).double() @ self.axes.T).float().numpy()

        with _pool(threads) as pool:
            list(pool.map(project, blocks(len(x), BLOCK)))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return the attributes by name, for storage."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the projection as safetensors."""
        write_tensors(path, self.tensors(), {}, "pca")


def read_projection(path: str | os.PathLike[str]) -> Projection:
    """Read a projection that `Projection.save` wrote.

    Raises:
        DamagedFileError: the file is damaged.
        UserError: it is absent.
    """
    return Projection(**read_tensors(path, "pca")[0])


def fit_pca(x: np.ndarray, dim: int, chosen: np.ndarray, threads: int | None = None) -> Projection:
    """Return the projection onto the first principal axes.

    Args:
        x: (N, d) vectors.
        dim: number of axes, below d and below the number of chosen rows.
        chosen: (N,) bool, the rows to fit to.
        threads: number of CPU threads; only speed depends on it. None: one for each core.
    """
    mean = mean_of_rows(x, chosen)
    with _pool(threads) as pool:
        scatter = _scatter(x, mean, np.flatnonzero(chosen), pool)
        values, vectors = torch.linalg.eigh(scatter, UPLO="U")
    order = torch.arange(len(values) - 1, len(values) - 1 - dim, -1)
    axes = vectors[:, order].T
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = torch.where(largest < 0, -axes, axes).contiguous()
    freedom = int(chosen.sum()) - 1
    variances = values[order].clamp(min=0) / freedom
    return Projection(axes, torch.from_numpy(mean), variances, scatter.diagonal().sum() / freedom)


def _scatter(x: np.ndarray, mean: np.ndarray, rows: np.ndarray, pool: ThreadPoolExecutor) -> Tensor:
    """Return the upper triangle of the sum of (x - mean) (x - mean)^T over `rows`, (d, d) float64."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    parts = list(blocks(x.shape[1], TILE))
    tiles = [(left, right) for left in parts for right in parts if left.start <= right.start]
    for block in blocks(len(rows), BLOCK):
        centred = torch.from_numpy(x[rows[block]] - mean)

        def add(tile: tuple[slice, slice], centred: Tensor = centred) -> None:
            left, right = tile
            total[left, right] += centred[:, left].T @ centred[:, right]

        list(pool.map(add, tiles))
    return total


@contextlib.contextmanager
def _pool(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """Start threads in each of which, as in the caller's, torch computes with a single thread of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads or os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
