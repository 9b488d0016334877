"""k-core filtering: the largest set of interactions in which every user and item has at least k interactions."""

import numpy as np

_BLOCK = 1 << 24


def kcore(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """Return which interactions are in the k-core, iterated to the fixed point.

    Args:
        user, item: (N,) integers, any values; one interaction per row, repeated pairs count each time.
        k: smallest number of interactions of each user and item; 0 and 1 keep everything.

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
    if k <= 1 or not len(user):
        return np.ones(len(user), dtype=bool)
    all_users, all_items = _codes(user), _codes(item)
    u, i = all_users, all_items
    of_user, of_item = _counts(u), _counts(i)
    while True:
        # One byte per user fits into the CPU cache where counts would not.
        enough_user, enough_item = of_user >= k, of_item >= k
        stays = enough_user[u]
        stays &= enough_item[i]
        if stays.all():
            # An interaction is in the core if and only if both its user and its item are.
            keep: np.ndarray = enough_user[all_users]
            keep &= enough_item[all_items]
            return keep
        goes = ~stays
        of_user -= _counts(u[goes], len(of_user))
        of_item -= _counts(i[goes], len(of_item))
        u, i = u[stays], i[stays]


def _counts(codes: np.ndarray, size: int = 0) -> np.ndarray:
    # In blocks, because bincount makes a copy of eight bytes per row.
    size = size or int(codes.max()) + 1
    counts = np.zeros(size, dtype=np.int64)
    for start in range(0, len(codes), _BLOCK):
        counts += np.bincount(codes[start : start + _BLOCK], minlength=size)
    return counts


def _codes(values: np.ndarray) -> np.ndarray:
    """Return (N,) codes for any integers; small non-negative integers are their own codes, which saves a sort."""
    if values.min() >= 0 and values.max() < 4 * len(values) + 1024:
        return values
    return np.unique(values, return_inverse=True)[1]
