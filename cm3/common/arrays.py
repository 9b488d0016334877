"""Arrays larger than memory, memory-mapped from a temporary file."""

import errno
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cm3.common.errors import UserError

log = logging.getLogger(__name__)

SHARE = 0.5
"""Largest fraction of the free memory for one array; a larger array is memory-mapped."""

BLOCK = 8192
"""Rows per block."""

CGROUP_ROOT, CGROUP_MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def zeros(shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
    """Return an array of zeros: in memory, or memory-mapped where it needs more than `SHARE` of the free memory.

    The file is in the temporary folder (TMPDIR) and has no name: it vanishes with the array or the process.

    Raises:
        UserError: the folder has no room for it.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= SHARE * free_memory():
        return np.zeros(shape, dtype)
    log.info(
        "%.1f GB of vectors need too much of the free memory; they are in a temporary file in %s",
        size / 1e9,
        tempfile.gettempdir(),
    )
    return mapped_zeros(shape, dtype)


def mapped_zeros(shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
    """Return an array of zeros that is memory-mapped from a file without a name in the temporary folder.

    Raises:
        UserError: the folder has no room for it.
    """
    size, folder = math.prod(shape) * np.dtype(dtype).itemsize, tempfile.gettempdir()
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            # With blocks not reserved, a full disk would kill the process by a signal at a later write.
            reserve = getattr(os, "posix_fallocate", None)  # macOS has none
            reserve(file.fileno(), 0, size) if reserve else file.truncate(size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"{folder}: no room for {size / 1e9:.1f} GB of vectors; set TMPDIR to a folder on a disk that has it"
            ) from None
        return np.asarray(np.memmap(file, dtype, "r+", shape=tuple(shape)))


def blocks(rows: int, size: int = BLOCK) -> Iterator[slice]:
    """Yield consecutive slices of up to `size` rows."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def rows_not_finite(x: np.ndarray) -> np.ndarray:
    """Return (N,) bool: the rows of (N, d) with NaN or infinity."""
    found = np.zeros(len(x), bool)
    for rows in blocks(len(x)):
        found[rows] = ~np.isfinite(x[rows]).all(axis=1)
    return found


def keep_rows(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the `rows`, ascending (R,), of `x` (N, d), moved to the front of `x` without a copy."""
    for here in blocks(len(rows)):
        x[here] = x[rows[here]]
    return x[: len(rows)]


def mean_of_rows(x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the mean (d,) float64 of the rows of (N, d) where `chosen` (N,) is true."""
    total = np.zeros(x.shape[1], np.float64)
    for rows in blocks(len(x)):
        total += x[rows][chosen[rows]].sum(0, dtype=np.float64)
    found: np.ndarray = total / chosen.sum()
    return found


def free_memory() -> float:
    """Return the bytes that this process can still allocate: of the machine, or within its control group's limit."""
    return min([float(psutil.virtual_memory().available), *_left_to_groups()])


def _left_to_groups() -> Iterator[float]:
    """Yield the bytes left within each memory limit of this process's control groups (v1, v2); page cache is free."""
    try:
        lines = CGROUP_MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = CGROUP_ROOT / controllers
        limit, used = ("memory.max", "anon") if not controllers else ("memory.limit_in_bytes", "total_rss")
        group = top / path.lstrip("/")
        # In a container the group's path may not be visible; the mounted folder is then the group itself.
        for folder in dict.fromkeys([*(g for g in (group, *group.parents) if g.is_relative_to(top)), top]):
            try:
                most = float((folder / limit).read_text())
                stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                yield max(0.0, most - float(stat[used]))
            except (OSError, ValueError, KeyError):
                continue  # no limit here
