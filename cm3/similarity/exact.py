"""Exact nearest neighbours by cosine: low-precision products select candidates, float64 products rank them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from cm3.common.arrays import zeros
from cm3.common.device import has_fast_bfloat16
from cm3.common.topk import largest, top_k

BLOCK_ENTRIES = 2**25  # of a block's product on the CPU: 128 MiB
CUDA_BLOCK_ENTRIES = 2**30  # as long as a quarter of the free memory holds them
CHUNK_COLUMNS = 2**16
MARGIN = 16
PILOT = 512
"""Rows that decide whether reduced products are worth a pass."""
_RARE, _FUTILE = 0.1, 0.5  # of these need another pass
# Half a unit in the last place of a float32 of at most 1, doubled.
_ROUNDING = 2.0**-24
_BFLOAT16_ROUNDING = 2.0**-8  # of a number that is rounded to bfloat16, relative to it
# Entries of one float64 piece: in the CPU's cache, or enough to occupy a GPU.
_PIECE = {"cpu": 2**18, "cuda": 2**26}


def knn(
    features: Tensor, k: int, include_self: bool = True, rows: Tensor | None = None, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k nearest rows of each row by cosine, (indices (N, k) int64, scores (N, k)).

    The scores are cosines computed in float64 and rounded (`UnitRows.rounded`); of equal ones the lower index comes
    first. Neither indices nor scores depend on the block size, the threads or the device. A row of zeros has cosine 0
    with every row. Memory: one copy of the features, at most float32, and one block; never an N x N matrix.

    Algorithm: unit rows are quantised to the type that the machine multiplies fastest (bfloat16 where a CPU has
    instructions for it, with products of the same type; TF32 on a GPU). The quantisation error is measured, which bounds
    the error of a product by Cauchy and Schwarz. The best candidates of each row, k and some more, are scored in float64.
    Where the last of them is within the bound of the k-th score, a row outside the candidates could be a neighbour; such
    rows are searched again in float32, and the rest in float64. A few rows show beforehand how many candidates it takes,
    and if that would be most rows, all are searched in float32 at once.

    Args:
        features: (N, d), float32 or float64; the scores have the same type. Other types are converted to float32.
        k: neighbours per row.
        include_self: whether a row may be its own neighbour.
        rows: (R,) the query rows, all by default; the results then have R rows.
        among: (A,) ascending, the rows that may be neighbours, all by default. Needs `include_self`.

    Raises:
        ValueError: fewer than k rows to choose from, or a value that is not finite.
    """
    x = torch.as_tensor(features)
    n = len(x if among is None else among)
    if not 0 < k <= n - (not include_self):
        raise ValueError(f"k = {k} neighbours of {n} rows{'' if include_self else ' without the row itself'}")
    unit_rows = UnitRows(x).check_finite()
    rows = torch.arange(len(x), device=x.device) if rows is None else rows.to(x.device)
    if include_self:
        return _nearest(unit_rows, rows, k, None if among is None else among.to(x.device))
    if among is not None:
        raise ValueError("among needs include_self=True")
    indices, scores = _nearest(unit_rows, rows, k + 1, None)
    # Drop the row itself, or the last neighbour where k + 1 equal ones of lower index came before it.
    drop = indices == rows[:, None]
    drop[:, -1] |= ~drop.any(dim=1)
    kept = drop.sort(dim=1, stable=True).indices[:, :k]
    return indices.gather(1, kept), scores.gather(1, kept)


def _nearest(unit_rows: UnitRows, rows: Tensor, k: int, among: Tensor | None) -> tuple[Tensor, Tensor]:
    indices = torch.empty((len(rows), k), dtype=torch.int64, device=rows.device)
    scores = torch.empty((len(rows), k), dtype=unit_rows.dtype, device=rows.device)
    pending = torch.arange(len(rows), device=rows.device)
    bits, margin = droppable_bits(rows.device), 2 * MARGIN
    if bits and len(rows) >= 16 * PILOT:
        bits, margin = _reduced_pass(unit_rows, rows[:: len(rows) // PILOT], k, among, bits)
    for dropped_bits, more in {bits: margin, 0: MARGIN}.items():
        if len(pending):
            indices[pending], scores[pending], unsure = scan(unit_rows, rows[pending], k, among, dropped_bits, more)
            pending = pending[unsure]
    if len(pending):
        indices[pending], scores[pending] = _finish(unit_rows, rows[pending], k, among, scores[pending, -1])
    return indices, scores


def _reduced_pass(unit_rows: UnitRows, pilot: Tensor, k: int, among: Tensor | None, bits: int) -> tuple[int, int]:
    """Return the bits to drop and the candidates besides k, as results of some rows `pilot` suggest.

    Where neighbours are too close for reduced products, a pass with them is lost time, and 0 bits are dropped.
    """
    unsure = 1.0
    for margin in (2 * MARGIN, 4 * MARGIN):
        unsure = scan(unit_rows, pilot, k, among, bits, margin)[2].float().mean().item()
        if unsure < _RARE:
            return bits, margin
    return (bits, 4 * MARGIN) if unsure <= _FUTILE else (0, MARGIN)


def droppable_bits(device: torch.device) -> int:
    """Return how many low bits of a float32 the device's fastest product ignores; 0: reduced products do not pay."""
    if device.type == "cuda":
        return 13 if torch.cuda.get_device_capability(device) >= (8, 0) else 0
    return 16 if has_fast_bfloat16(device) else 0


@contextlib.contextmanager
def _reduced_products(allowed: bool) -> Iterator[None]:
    # This permits reduced precision; quantised inputs give products within the bound whether or not it is used.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def scan(
    unit_rows: UnitRows, rows: Tensor, k: int, among: Tensor | None, dropped_bits: int, margin: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices and scores (R, k) of the nearest candidates, and (R,) bool: the result of the row is not certain.

    Besides k there are `margin` candidates: the wider the bound, the more it takes, and a row with too few is searched again.
    Does not synchronise a GPU.
    """
    copies, error = unit_rows.quantised(dropped_bits)
    relative = _BFLOAT16_ROUNDING if copies.dtype == torch.bfloat16 else 0.0  # error of a product, besides
    others = copies if among is None else copies[among]
    n = len(others)
    width = min(n, k + margin)
    indices = torch.empty((len(rows), k), dtype=torch.int64, device=rows.device)
    scores = torch.empty((len(rows), k), dtype=unit_rows.dtype, device=rows.device)
    unsure = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    columns = min(n, CHUNK_COLUMNS)
    block = max(1, min(len(rows), block_entries(rows.device) // columns))
    # Page faults of fresh memory for each product would cost more than the selection.
    buffer = copies.new_empty(block * columns)
    with _reduced_products(dropped_bits > 0):
        for start in range(0, len(rows), block):
            here = slice(start, start + block)
            bounds, candidates = candidates_of(copies[rows[here]], others, width, columns, buffer)
            candidates, order = candidates.sort(dim=1)
            candidates = candidates if among is None else among[candidates]
            bounds = bounds.gather(1, order).double()
            cosines = unit_rows.cosines(rows[here], candidates)
            # A stable sort of candidates in index order: so are equal scores.
            ranked, position = unit_rows.rounded(cosines).sort(dim=1, descending=True, stable=True)
            scores[here] = ranked[:, :k]
            indices[here] = candidates.gather(1, position[:, :k])
            if width < n:
                least = bounds.amin(dim=1)
                unsure[here] = least + relative * least.abs() >= ranked[:, k - 1].double() - error - _ROUNDING
                if relative:  # of negative numbers, `candidates_of` may have missed the largest
                    unsure[here] |= ~(least > 0)
            # The bound assumes how products are accumulated; this checks the machine.
            unsure[here] |= ((bounds - cosines).abs() > error + relative * bounds.abs()).any(dim=1)
    return indices, scores, unsure


def block_entries(device: torch.device) -> int:
    """Return the entries of a block's product: what a CPU's memory bus favours, or a quarter of a GPU's free memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return min(CUDA_BLOCK_ENTRIES, free // 16)
    return BLOCK_ENTRIES


def candidates_of(vectors: Tensor, others: Tensor, width: int, columns: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and column indices (R, width) of the largest products of `vectors` with `others`, unordered.

    Of bfloat16 products, those above 0 are the largest; of the others, any may be returned.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(others), columns):
        some = others[first : first + columns]
        product = buffer[: len(vectors) * len(some)].view(len(vectors), len(some))
        torch.mm(vectors, some.T, out=product)
        if product.dtype == torch.bfloat16:
            # As integers, positive numbers have the same order, in which maxima are found in a third of the time.
            product = product.view(torch.int16)
        values, places = largest(product, min(width, len(some)))
        found.append((values, places + first))
        if len(found) > 1:
            values, places = (torch.cat(pair, dim=1) for pair in zip(*found, strict=True))
            values, best = values.topk(min(width, values.shape[1]), dim=1, sorted=False)
            found = [(values, places.gather(1, best))]
    values, places = found[0]
    return values.view(vectors.dtype) if vectors.dtype == torch.bfloat16 else values, places


def knn_in_blocks(features: Tensor, k: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and scores (R, k) of the nearest rows as `knn` does, for a few query rows and without a copy of all.

    Memory: the query rows, one block of rows and copies of these.
    """
    queries = torch.arange(len(rows))
    indices = torch.empty((len(rows), 0), dtype=torch.int64)
    scores = torch.empty((len(rows), 0), dtype=features.dtype)
    size = max(1, BLOCK_ENTRIES // (4 * max(1, features.shape[1])))
    for start in range(0, len(features), size):
        block = features[start : start + size]
        among = torch.arange(len(rows), len(rows) + len(block))
        found, new = knn(torch.cat([features[rows], block]), min(k, len(block)), rows=queries, among=among)
        # Of equal scores, those of earlier blocks have lower indices; a stable sort keeps them first.
        scores, place = torch.cat([scores, new], dim=1).sort(dim=1, descending=True, stable=True)
        indices = torch.cat([indices, found + (start - len(rows))], dim=1).gather(1, place)[:, :k]
        scores = scores[:, :k]
    return indices, scores


def _finish(unit_rows: UnitRows, rows: Tensor, k: int, among: Tensor | None, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and scores (R, k) of the nearest of all rows, by float64 products with every one of them.

    A product whose upper and lower bound round to the same score is final. The few others that reach `floor` (R,), a
    lower bound of the k-th score, are summed in the fixed order. Thousands of rows that differ by noise only, such as a
    shop's placeholder image, therefore cost a matrix product and not a gather.
    """
    d = unit_rows.shape[1]
    every = torch.arange(unit_rows.shape[0], device=rows.device) if among is None else among
    n = len(every)
    error = (d + 8) * 2.0**-50
    columns = max(1, min(n, 8192, block_entries(rows.device) // (4 * d)))
    block = max(1, block_entries(rows.device) // (16 * columns))
    indices, scores = [], []
    for part, least in zip(rows.split(block), floor.split(block), strict=True):
        vectors = unit_rows.unit(part)
        best = torch.full((len(part), k), -torch.inf, dtype=unit_rows.dtype, device=rows.device)
        nearest = torch.zeros((len(part), k), dtype=torch.int64, device=rows.device)
        for others in every.split(columns):
            product = vectors @ unit_rows.unit(others).T
            low, high = unit_rows.rounded(product - error), unit_rows.rounded(product + error)
            at, column = torch.nonzero((low != high) & (high >= least[:, None]), as_tuple=True)
            low[at, column] = unit_rows.rounded(unit_rows.cosines(part[at], others[column][:, None]).squeeze(1))
            # Neighbours found before have lower indices and come first.
            place, best = top_k(torch.cat([best, low], dim=1), k)
            nearest = torch.cat([nearest, others.expand(len(part), -1)], dim=1).gather(1, place)
        indices.append(nearest)
        scores.append(best)
    return torch.cat(indices), torch.cat(scores)


class UnitRows:
    """The rows of `x` (N, d) divided by their lengths. A row of zeros has cosine 0 with every row.

    Args:
        x: float32 or float64, also the type of the scores; other types are converted to float32.
    """

    def __init__(self, x: Tensor) -> None:
        x = x if x.dtype == torch.float64 else x.float()
        self.dtype, self.shape = x.dtype, x.shape
        self._x = _of_moderate_size(x) if x.dtype == torch.float64 else x
        self._length = torch.empty(len(x), dtype=torch.float64, device=x.device)
        for part in self._parts():
            self._length[part] = _sum(self._x[part].double().square()).sqrt_()
        # 1 for a row of zeros; NaN and infinity stay, for `check_finite`.
        self._length = torch.where(self._length == 0, 1, self._length)

    def check_finite(self) -> UnitRows:
        """Return self.

        Raises:
            ValueError: a value is not finite.
        """
        if not torch.isfinite(self._length).all():
            raise ValueError("the features hold NaN or infinity")
        return self

    def _parts(self) -> list[slice]:
        size = max(1, _PIECE.get(self._x.device.type, 2**18) // max(1, self.shape[1]))
        return [slice(start, start + size) for start in range(0, self.shape[0], size)]

    @functools.cached_property
    def _inverse(self) -> Tensor | None:
        """Inverse lengths (N,) float32; None where products with them could overflow or lose digits."""
        moderate = self.dtype == torch.float32 and (torch.frexp(self._length).exponent.abs() < 100).all()
        return self._length.reciprocal().float() if moderate else None

    def unit(self, rows: Tensor | slice) -> Tensor:
        """Return these rows with unit length, (R, d) float64."""
        return self._x[rows].double() / self._length[rows, None]

    def single(self, rows: Tensor) -> Tensor:
        """Return these rows with unit length, (R, d) float32, each number within two units in the last place."""
        if self._inverse is None:
            return self.unit(rows).float()
        return self._x.index_select(0, rows).mul_(self._inverse[rows, None])

    def sums(self, rows: Tensor, starts: Tensor) -> Tensor:
        """Return sums (G, d) float32 of consecutive groups of the unit rows `rows` (R,), of which `starts` (G,) are the first.

        Each sum is computed in the order of its rows, whatever the number of threads. An empty group has a sum of zeros.
        """
        if self._inverse is None:
            return embedding_bag(torch.arange(len(rows)), self.single(rows), starts, mode="sum")
        return embedding_bag(rows, self._x, starts, mode="sum", per_sample_weights=self._inverse[rows])

    def cosines(self, rows: Tensor, others: Tensor) -> Tensor:
        """Return the cosines (R, W) float64 of `rows` (R,) with `others` (R, W), both int64.

        The products are summed in a fixed order by elementwise additions, so a pair's cosine is bit-identical in any
        batch, on any number of threads and on any device; a matrix product guarantees none of these.
        """
        size = max(1, _PIECE.get(rows.device.type, 2**18) // max(1, others.shape[1] * self.shape[1]))
        found = torch.empty(others.shape, dtype=torch.float64, device=rows.device)
        for start in range(0, len(rows), size):
            here = slice(start, start + size)
            some, them = rows[here], others[here]
            terms = self._x[them].double().mul_(self._x[some].double()[:, None])
            found[here] = _sum(terms).div_(self._length[them] * self._length[some, None])
        return found

    def rounded(self, cosines: Tensor) -> Tensor:
        """Return float64 cosines as scores: rounded to float32, or for float64 features to multiples of 2^-44.

        Parallel rows of different length have cosines that differ by some 1e-16: rounding makes them equal.
        """
        if self.dtype == torch.float64:
            return (cosines * 2.0**44).round_().mul_(2.0**-44).add_(0.0)
        return cosines.float().add_(0.0)  # -0 + 0 is 0

    def quantised(self, dropped_bits: int) -> tuple[Tensor, Tensor]:
        """Return float32 unit rows (N, d) rounded by `dropped_bits` low bits, and a bound of the error of their products.

        Without their 16 low bits they are bfloat16; what a product loses in that type is not in the bound.

        With u = c + r for the unit rows u and their copies c, |u_i u_j - c_i c_j| <= |r_i| + |r_j| + |r_i||r_j| by
        Cauchy and Schwarz; |r| is measured. Accumulating d products in float32, rounded or truncated and in any order,
        adds at most d 2^-22. The bound is a 0-d float64 tensor on the rows' device.
        """
        dtype = torch.bfloat16 if dropped_bits == 16 else torch.float32
        if self._x.device.type == "cpu":
            copies = torch.from_numpy(zeros(self.shape, np.int16 if dropped_bits == 16 else np.float32)).view(dtype)
        else:
            copies = torch.empty(self.shape, dtype=dtype, device=self._x.device)
        residual = torch.zeros((), dtype=torch.float64, device=self._x.device)
        for part in self._parts():
            unit = self.unit(part)
            copy = unit.to(dtype)
            if 0 < dropped_bits < 16:
                bits = copy.view(torch.int32) + (1 << (dropped_bits - 1))  # to the nearest
                copy = (bits & (-1 << dropped_bits)).view(torch.float32)
            copies[part] = copy
            residual = torch.maximum(residual, unit.sub_(copy).square_().sum(dim=1).amax().sqrt())
        return copies, 2 * residual + residual**2 + self.shape[1] * 2.0**-22 * (1 + residual) ** 2


def _of_moderate_size(x: Tensor) -> Tensor:
    """Return float64 rows scaled by exact powers of two where their squares would overflow or vanish."""
    largest = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(len(x))
    exponent = torch.frexp(largest).exponent.long().clamp_(-1000, 1000)
    extreme = exponent.abs() > 300
    if not extreme.any():
        return x
    # The bits of 2^-exponent: a power function may err in the last place.
    scale = (1023 - torch.where(extreme, exponent, 0) << 52).view(torch.float64)
    return x * scale[:, None]


def _sum(terms: Tensor) -> Tensor:
    """Return the sums over the last dimension, by halves; overwrites `terms`."""
    length = terms.shape[-1]
    if not length:
        return terms.sum(dim=-1)
    while length > 1:
        half = (length + 1) // 2
        terms[..., : length - half] += terms[..., half:length]
        length = half
    return terms[..., 0]
