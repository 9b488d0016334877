"""Groups of rows with equal inputs: one row of each group is encoded for all."""

import numpy as np
import pyarrow as pa


class UniqueInputs:
    """Rows grouped by the digests of their inputs.

    Attributes:
        rows: (D,) the first row of each group, in the given order.
        digests: (D,) the digests of their inputs.
    """

    def __init__(self, rows: np.ndarray, digests: pa.FixedSizeBinaryArray) -> None:
        """Group `rows` (R,) by the `digests` (N,) of all rows."""
        encoded = digests.take(pa.array(rows)).dictionary_encode()
        # Numbered by first appearance.
        group = encoded.indices.to_numpy()
        self.rows, self.digests = rows[np.unique(group, return_index=True)[1]], encoded.dictionary
        order = np.argsort(group, kind="stable")
        self._rows, self._group = rows[order], group[order]

    def members(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows (R,) of the groups start to stop, and the group of each row (R,), counted from start."""
        first, last = np.searchsorted(self._group, [start, stop])
        return self._rows[first:last], self._group[first:last] - start
