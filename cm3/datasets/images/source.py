"""Interface between the images stage and the image sources: request and result types."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cm3.common.tables import OK
from cm3.datasets.images.stored import StoredImages
from cm3.datasets.images.validate import ImageFacts


@dataclass(frozen=True)
class Wanted:
    """One item: its id, and the values of its image column, best first."""

    item_id: str
    references: Sequence[str]


@dataclass(frozen=True)
class Found:
    """An item's image, or the reason why there is none.

    Attributes:
        url: URL or path of the image.
        status: ok, missing or failed.
        reasons: reasons of failure, one per URL or path; empty when ok.
        kinds: short categories of the reasons, such as "HTTP 404", for counting.
        image: facts about the image; None unless ok.
        data: its bytes; empty unless ok, and may be left out for an image that is in `Search.stored`.
    """

    url: str = ""
    status: str = OK
    reasons: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    image: ImageFacts | None = None
    data: bytes = b""


@dataclass(frozen=True)
class Search:
    """Request to an image source.

    Attributes:
        wanted: the items.
        spec, runtime, inputs: of the images stage.
        folder: of the manifest and shards of earlier runs, and of files that a source keeps.
        stored: the images in these shards.
        fresh: folder whose files replace those in `folder` when the stage is done.
        facts: entries of the stage's record; a source adds its own.
    """

    wanted: Sequence[Wanted]
    spec: dict[str, Any]
    runtime: dict[str, Any]
    inputs: dict[str, Path]
    folder: Path
    stored: StoredImages
    fresh: Path
    facts: dict[str, Any] = field(default_factory=dict)


class Find(Protocol):
    """`find` of an image source: yields one Found per wanted item, in the same order."""

    def __call__(self, search: Search) -> Iterator[Found]:
        """Find images."""
