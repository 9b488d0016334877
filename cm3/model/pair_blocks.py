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


def leave_out_lower(exponents: Tensor) -> None:
    """Set the exponents of a block's pairs a >= b to minus infinity."""
    corner = exponents[:, : len(exponents)]
    corner.masked_fill_(torch.ones_like(corner, dtype=torch.bool).tril_(), -torch.inf)


def number_of_pairs(n: int, counts: Tensor | None, device: torch.device) -> Tensor:
    """Return the number of pairs of n rows, row a counted `counts[a]` times; pairs of a row with itself are none."""
    if counts is None:
        return torch.full((), n * (n - 1) // 2, device=device)
    return (counts.sum().square() - counts.square().sum()) // 2
