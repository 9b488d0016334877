"""The pairs a < b of n rows in blocks: which rows and columns, which process computes them, and how many pairs there are."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cm3.common.distributed import ProcessShard


def pair_blocks(n: int, block_rows: int, shard: ProcessShard | None) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of the blocks of the upper triangle that are this process's."""
    for block, start in enumerate(range(0, n, block_rows)):
        if shard is None or shard.owns(block):
            yield slice(start, start + block_rows), slice(start, n)


def lower_left_out(block_rows: int, like: Tensor) -> Tensor:
    """Return what is added to the first columns of a block's exponents to leave out the pairs a >= b, (B, B).

    It is minus infinity there and 0 elsewhere, of the type and device of `like`; a block of fewer rows takes its first ones.
    """
    size = min(block_rows, len(like))
    return torch.full((size, size), -torch.inf, dtype=like.dtype, device=like.device).tril_()


def number_of_pairs(n: int, counts: Tensor | None, device: torch.device) -> Tensor:
    """Return the number of pairs of n rows, row a counted `counts[a]` times; pairs of a row with itself are none."""
    if counts is None:
        return torch.full((), n * (n - 1) // 2, device=device)
    return (counts.sum().square() - counts.square().sum()) // 2
