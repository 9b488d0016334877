"""k-core: the largest set of interactions in which every user and every item has at least k of them."""

import numpy as np


def kcore(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """Return which interactions lie in the k-core, iterated to the fixed point.

    Args:
        user, item: (N,) integers, any values; one interaction a row, repeated pairs count as often as they stand.
        k: least number of interactions of each user and item; 0 and 1 keep everything.

    Returns:
        (N,) bool.

    Raises:
        ValueError: the arrays are not one-dimensional integers of equal length.
    """
    user, item = np.asarray(user), np.asarray(item)
    if user.ndim != 1 or user.shape != item.shape:
        raise ValueError(f"user {user.shape} and item {item.shape} must be one-dimensional and of equal length")
    if len(user) and not (np.issubdtype(user.dtype, np.integer) and np.issubdtype(item.dtype, np.integer)):
        raise ValueError(f"user {user.dtype} and item {item.dtype} must be integers")
    keep = np.ones(len(user), dtype=bool)
    if k <= 1 or not len(user):
        return keep
    rows = np.arange(len(user))
    u, i = _codes(user), _codes(item)
    while True:
        stays = (np.bincount(u) >= k)[u] & (np.bincount(i) >= k)[i]
        if stays.all():
            return keep
        keep[rows[~stays]] = False
        rows, u, i = rows[stays], u[stays], i[stays]
        if not len(rows):
            return keep


def _codes(values: np.ndarray) -> np.ndarray:
    """Return (N,) codes for any integers: small non-negative ones are their own codes, which spares a sort."""
    if values.min() >= 0 and values.max() < 4 * len(values) + 1024:
        return values.astype(np.int64, copy=False)
    return np.unique(values, return_inverse=True)[1]
