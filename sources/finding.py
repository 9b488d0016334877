"""What every way of finding pictures hands to the images stage."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stages.tables import OK


@dataclass(frozen=True)
class Wanted:
    """One item's picture to be found: its id, and what its image column holds, best first."""

    item_id: str
    references: Sequence[str]


@dataclass(frozen=True)
class Found:
    """Where an item's picture lies, or why there is none.

    Attributes:
        path: file with the picture's bytes; None unless status is ok.
        url: where it comes from, a URL or a path.
        status: ok (bytes are there, whether they are a picture is not known yet), missing or failed.
        error: the reason when not ok.
    """

    path: Path | None
    url: str = ""
    status: str = OK
    error: str = ""


class Find(Protocol):
    """`find` of a finder module: yields one Found for each wanted item, in the same order."""

    def __call__(
        self,
        wanted: Sequence[Wanted],
        spec: dict[str, Any],
        runtime: dict[str, Any],
        inputs: dict[str, Path],
        downloads: Path,
    ) -> Iterator[Found]:
        """Find pictures; `downloads` is a folder for what must be fetched, kept until the stage is done."""
