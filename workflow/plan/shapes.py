"""Rows and widths of tables on disk, read from their footers while the workflow is planned."""

import functools
from dataclasses import dataclass
from pathlib import Path

from cm3.model_spec import MEGABYTE


@dataclass(frozen=True)
class Shape:
    """Rows and vector width of a table; the width is 0 where it holds no vectors."""

    rows: int
    dim: int = 0

    @property
    def megabytes(self) -> float:
        """Size of the vectors as float32."""
        return self.rows * self.dim * 4 / MEGABYTE


def shape_of(path: str | None) -> Shape | None:
    """Return the shape of a table, None if it is absent or damaged: the job that reads it says so."""
    if not path or not Path(path).is_file():
        return None
    return _footer(path, Path(path).stat().st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _footer(path: str, modified: int) -> Shape | None:
    # Loaded where a table is there to be read: planning a fresh data set needs none of it.
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError):  # pa.ArrowInvalid is a ValueError
        return None
    widths = [getattr(field.type, "list_size", 0) for field in file.schema_arrow]
    return Shape(file.metadata.num_rows, max(widths, default=0))
