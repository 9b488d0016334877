"""What every way of finding images is given by the images stage, and hands back to it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cm3.common.tables import OK
from cm3.datasets.images.validate import ImageFacts


@dataclass(frozen=True)
class Wanted:
    """One item's image to be found: its id, and what its image column holds, best first."""

    item_id: str
    references: Sequence[str]


@dataclass(frozen=True)
class Found:
    """An item's image, or why there is none.

    Attributes:
        url: where it comes from, a URL or a path.
        status: ok, missing or failed.
        reasons: why not, one for each place that was looked at; empty when ok.
        kinds: the same in a word or two each, such as "HTTP 404", for counting.
        image, data: what it is and its bytes; None and empty unless ok.
    """

    url: str = ""
    status: str = OK
    reasons: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    image: ImageFacts | None = None
    data: bytes = b""


@dataclass(frozen=True)
class Search:
    """What a finder is to do.

    Attributes:
        wanted: the items.
        spec, runtime, inputs: of the images stage.
        folder: where manifest and shards of earlier runs are, and what a finder keeps.
        fresh: folder whose files replace those in `folder` when the stage is done.
        facts: for the stage's record; a finder adds its own.
    """

    wanted: Sequence[Wanted]
    spec: dict[str, Any]
    runtime: dict[str, Any]
    inputs: dict[str, Path]
    folder: Path
    fresh: Path
    facts: dict[str, Any] = field(default_factory=dict)


class Find(Protocol):
    """`find` of a finder module: yields one Found for each wanted item, in the same order."""

    def __call__(self, search: Search) -> Iterator[Found]:
        """Find images."""
