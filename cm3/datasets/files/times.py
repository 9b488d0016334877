"""Times in seconds, milliseconds or as eight-digit dates -> Unix seconds."""

import numpy as np

# Seconds are below this until the year 5138; milliseconds are above it since 1973.
_MILLISECONDS_FROM = 10**11
_FIRST, LAST = 1, 4_102_444_800
"""Unix seconds of 1970 and of 2100."""
_LARGEST = 2.0**62


def in_milliseconds(times: np.ndarray) -> np.ndarray:
    """Return which of (N,) times are milliseconds, by their size."""
    found: np.ndarray = np.abs(times) >= _MILLISECONDS_FROM
    return found


def seconds_of(times: np.ndarray) -> np.ndarray:
    """Return (N,) int64 Unix seconds of seconds and milliseconds, distinguished by size; 0 for other values."""
    with np.errstate(invalid="ignore"):
        known = np.where(np.abs(times) < _LARGEST, times, 0)
        return np.where(in_milliseconds(known), known // 1000, known // 1).astype(np.int64)


def plausible(seconds: np.ndarray) -> np.ndarray:
    """Return which of (N,) Unix seconds are plausible: after 0, which means unknown, and before 2100."""
    return (seconds >= _FIRST) & (seconds <= LAST)


def seconds_of_dates(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which of (N,) finite numbers are dates such as 20200916, and their Unix seconds."""
    known = (numbers >= 1900_01_01) & (numbers < 2100_01_01) & (numbers % 1 == 0)
    year, rest = np.divmod(np.where(known, numbers, 1970_01_01).astype(np.int64), 10_000)
    month, day = rest // 100, rest % 100
    first = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    date = first.astype("datetime64[D]") + (day - 1)
    known &= (month >= 1) & (month <= 12) & (date.astype("datetime64[M]") == first)
    return known, date.astype("datetime64[s]").astype(np.int64)
