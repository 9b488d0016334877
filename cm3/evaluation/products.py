"""Scores by products of embeddings, and the best items by bfloat16 products, whose scores are those of float32 products."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cm3.common import topk
from cm3.common.device import has_fast_bfloat16

ROW_MULTIPLE = 16
"""Rows of a block are padded to a multiple of this. A matrix product has another kernel for the rows after the last full
tile, whose sums differ in the last digit: without padding a user's scores would depend on the size of the block."""

MARGIN = 32
"""Candidates of a list besides its length."""
REDUCED_FROM = 2**22
"""Numbers in the item embeddings from which bfloat16 products save more time than the scores of the candidates take."""
PROBE_USERS = 64
TILES_ENTRIES = 2**22  # numbers of gathered item embeddings: they fit the cache

_ROUNDING = 2.0**-7  # of a product that is rounded or truncated to bfloat16
_SMALLEST = 2.0**-100  # what numbers that vanish in a sum amount to, at most
_OVERFLOW = 2.0**120  # scores below it are finite, however they are summed
_LOWEST = -(2**15)  # of the bits of a bfloat16 as an integer


class ProductScores:
    """Scores of users (b,) for all items, (b, I), by the products of their embeddings, (U, D) and (I, D).

    On the CPU a call overwrites the scores of the one before: page faults of fresh memory cost as much as half of the
    arithmetic.
    """

    def __init__(self, users: Tensor, items: Tensor, unit: bool = False) -> None:
        """With `unit`, vectors of users are normalised; those of items are taken as they are."""
        self.users, self.items, self.unit = users, items, unit
        self.buffer = users.new_empty(0, len(items))
        self._reduced: ReducedProducts | None = None

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """Return the scores."""
        vectors = self.vectors(rows)
        if vectors.device.type != "cpu":
            return vectors @ self.items.T
        if len(self.buffer) < len(rows):
            self.buffer = vectors.new_empty(len(rows), len(self.items))
        return torch.mm(vectors, self.items.T, out=self.buffer[: len(rows)])

    def vectors(self, rows: Tensor) -> Tensor:
        """Return the vectors (b, D) of users (b,) that are multiplied."""
        vectors = self.users[rows]
        return functional.normalize(vectors, dim=1) if self.unit else vectors

    @torch.no_grad()
    def reduced(self, k: int) -> "ReducedProducts | None":
        """Return bfloat16 products for lists of length k; None where they save nothing or this CPU's sums may differ.

        The scores of candidates are checked to the last bit on some users for each length.
        """
        width = candidates_of(k)
        if (
            not has_fast_bfloat16(self.items.device)
            or {self.users.dtype, self.items.dtype} != {torch.float32}
            or self.items.numel() < REDUCED_FROM
            or len(self.items) < 2 * width * topk.GROUP
        ):
            return None
        self._reduced = self._reduced or ReducedProducts(self.items)
        rows = torch.arange(0, len(self.users), max(1, len(self.users) // PROBE_USERS))[:PROBE_USERS]
        return self._reduced if self._reduced.reproduces(self.vectors(rows), width) else None


def padded_scores(score: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Return the scores (b, I) of users (b,), computed for a multiple of `ROW_MULTIPLE` of them."""
    padding = rows[-1:].expand(-len(rows) % ROW_MULTIPLE)
    return score(torch.cat([rows, padding]))[: len(rows)]


def candidates_of(k: int) -> int:
    """Return the number of candidates for a list of length k, a multiple of `ROW_MULTIPLE`."""
    return -(-(k + MARGIN) // ROW_MULTIPLE) * ROW_MULTIPLE


class ReducedProducts:
    """Lists of the best items by bfloat16 products with the items (I, D) float32, in a quarter of the time or less.

    For a vector u and an item i with copies v and j in bfloat16, |u i - v j| <= |u| |i - j| + |u - v| |j| by Cauchy and
    Schwarz; the differences are measured. Sums of D products in float32, of the copies and of the float32 product itself, in
    any order, add at most D 2^-21 |u| |i|. Two more numbers in v and in j add this bound to their product, which is then
    above the score, by more for a long item than for a short one. What is not among the best candidates has a score below
    theirs; where the last item of a list is above that, the list is final. The scores of the candidates are computed by a
    tile of the float32 product, which gives the same sums as the whole.
    """

    def __init__(self, items: Tensor) -> None:
        self.items = items
        self.copies = items.new_empty(len(items), items.shape[1] + 2, dtype=torch.bfloat16)
        self._longest = torch.zeros((), dtype=torch.float64)
        of_sums = self.copies.shape[1] * 2.0**-21
        for part, copies in zip(items.split(2**16), self.copies.split(2**16), strict=True):
            length, residual = _bounded_copies(part, copies)
            copies[:, -2] = _above(residual + of_sums * length)
            copies[:, -1] = _above(length + residual)
            self._longest = torch.maximum(self._longest, length.max())
        self.buffer = self.copies.new_empty(0, len(items))
        self._reproduced: dict[int, bool] = {}

    def reproduces(self, vectors: Tensor, width: int) -> bool:
        """Return whether scores of so many candidates have the bits of the whole float32 product, as for these vectors."""
        if width not in self._reproduced:
            rows = torch.arange(len(vectors) // ROW_MULTIPLE * ROW_MULTIPLE)
            step = max(1, len(self.items) // width)
            places = (torch.arange(width) * step + rows[:, None]) % len(self.items)
            whole = (vectors[rows] @ self.items.T).gather(1, places)
            self._reproduced[width] = len(rows) > 0 and torch.equal(self.scores(vectors[rows], places), whole)
        return self._reproduced[width]

    def scores(self, vectors: Tensor, places: Tensor) -> Tensor:
        """Return the float32 scores (b, W) of vectors (b, D) for items (b, W)."""
        width, dim = places.shape[1], self.items.shape[1]
        found = torch.empty(places.shape)
        size = max(1, TILES_ENTRIES // max(1, width * dim))
        for start in range(0, len(vectors), size):
            here = slice(start, start + size)
            some = self.items.index_select(0, places[here].flatten()).view(-1, width, dim)
            # Contiguous: torch multiplies strided matrices one at a time, and threads wait for each other at each of them.
            tile = vectors[here, None].expand(-1, ROW_MULTIPLE, -1).contiguous()
            found[here] = torch.bmm(tile, some.transpose(1, 2))[:, 0]
        return found

    @torch.no_grad()
    def top(self, vectors: Tensor, k: int, masked: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return indices and scores (b, k) of the best items, and (b,) bool: the list is not certain.

        Of equal scores the lower item comes first and is kept.

        Args:
            vectors: (b, D) float32.
            k: length of the lists.
            masked: rows and items that are left out.
        """
        copies = self.copies.new_empty(len(vectors), self.copies.shape[1])
        length, residual = _bounded_copies(vectors, copies)
        copies[:, -2], copies[:, -1] = _above(length), _above(residual)
        if len(self.buffer) < len(vectors):
            self.buffer = self.copies.new_empty(len(vectors), len(self.items))
        product = torch.mm(copies, self.copies.T, out=self.buffer[: len(vectors)])
        # As integers, positive numbers have the same order, in which maxima are found in a third of the time.
        bits = product.view(torch.int16)
        bits[masked] = _LOWEST
        least, places = topk.largest(bits, candidates_of(k))
        places = places.sort(dim=1).values
        values = self.scores(vectors, places)
        ranked, order = values.sort(dim=1, descending=True, stable=True)
        bounds = product.gather(1, places).double()
        above = bounds.amin(dim=1) * (1 + _ROUNDING) + _SMALLEST
        certain = (least.amin(dim=1) >= 0) & (above < ranked[:, k - 1]) & (length * self._longest < _OVERFLOW)
        # The bound assumes how products are accumulated; this checks the machine.
        error = (copies[:, None, -2:].double() * self.copies[places, -2:].double()).sum(dim=2)
        certain &= ((bounds - error - values).abs() <= error + _ROUNDING * bounds.abs() + _SMALLEST).all(dim=1)
        return places.gather(1, order[:, :k]), ranked[:, :k], ~certain


def _bounded_copies(vectors: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Write vectors (n, D) into all but the last two columns of copies, and return upper bounds (2, n) float64.

    They are of the lengths of the vectors and of what the copies lack.
    """
    dim = vectors.shape[1]
    copies[:, :dim] = vectors
    lengths = torch.stack([torch.linalg.vector_norm(x, dim=1) for x in (vectors, vectors - copies[:, :dim])]).double()
    # Sums of D squares in float32; squares of numbers below 2^-63 vanish.
    length, residual = lengths * (1 + dim * 2.0**-22) + dim * 2.0**-62
    return length, residual


def _above(numbers: Tensor) -> Tensor:
    """Return numbers that are not negative in bfloat16, none of them smaller."""
    return (numbers * (1 + _ROUNDING)).bfloat16()
