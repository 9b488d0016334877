"""Finder for data sets without pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sources.finding import Found, Wanted
from stages.tables import MISSING


def find(
    wanted: Sequence[Wanted], spec: dict[str, Any], runtime: dict[str, Any], inputs: dict[str, Path], downloads: Path
) -> Iterator[Found]:
    """Yield `missing` for every item."""
    for _ in wanted:
        yield Found(None, "", MISSING, "the data set has no images section")
