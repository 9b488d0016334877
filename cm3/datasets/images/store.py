"""Outcomes by URL: from this run's journal, and from the shards of earlier runs.

While the stage runs, `images/.downloads/journal` grows by one record per URL. When it is done, the journal is deleted,
`images/.known.parquet` holds the outcome of each URL, and the bytes are in the shards.

Disk space: the bytes that a run downloads are stored twice until the stage is done (journal and shards).
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cm3.common.errors import UserError
from cm3.common.files import file_error
from cm3.common.tables import FAILED, MISSING, OK, read_metadata, read_table, write_table
from cm3.datasets.images.journal import Journal, Record
from cm3.datasets.images.shards import KNOWN
from cm3.datasets.images.stored import StoredImages
from cm3.datasets.images.validate import ImageFacts, PlaceholderError, check_placeholder

log = logging.getLogger("cm3.datasets.images")

_KNOWN = pa.schema(
    [
        ("url", pa.string()),
        ("status", pa.string()),
        ("kind", pa.string()),
        ("reason", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("hosts", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of downloading one URL.

    Attributes:
        status, kind, reason: as in Found.
        sha256, width, height, format: of the bytes if they are an image; a placeholder is `missing` and has them.
        hosts: hosts that it was redirected to.
        passing: failed for a reason that may be temporary, so another process tries again.
    """

    status: str
    kind: str = ""
    reason: str = ""
    sha256: str = ""
    width: int = 0
    height: int = 0
    format: str = ""
    hosts: tuple[str, ...] = ()
    passing: bool = False

    @classmethod
    def of(
        cls, image: ImageFacts, status: str, kind: str = "", reason: str = "", hosts: tuple[str, ...] = ()
    ) -> "Outcome":
        """Return the outcome of a URL whose response is an image."""
        return cls(status, kind, reason, image.sha256, image.width, image.height, image.format, hosts)

    @property
    def image(self) -> ImageFacts:
        """Facts about the bytes."""
        return ImageFacts(self.sha256, self.width, self.height, self.format)


class Store:
    """Outcomes by URL, and the bytes of those that are ok. `add` may be called from any thread.

    Attributes:
        outcomes: known outcomes; delete one, and its URL is downloaded again.
        failed_before: URLs that failed in an earlier, finished run.
    """

    def __init__(
        self, folder: Path, stored: StoredImages, spec: dict[str, Any], allowed: Callable[[str], bool]
    ) -> None:
        """Read the outcomes of earlier runs in `folder`.

        Args:
            folder: of the manifest and the shards.
            stored: the images in the shards.
            spec: only outcomes that hold under it are kept.
            allowed: whether a host may be contacted.
        """
        self.outcomes: dict[str, Outcome] = {}
        self._spec, self._allowed = spec, allowed
        self._under = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
        self._stored, self._downloaded = stored, dict[str, Record]()
        self._lock = threading.Lock()
        found: dict[str, Outcome] = {}
        self.failed_before: set[str] = set()
        if (folder / KNOWN).exists():
            found.update(self._known(folder / KNOWN))
            self.failed_before.update(url for url, outcome in found.items() if outcome.status == FAILED)
        self._journal = Journal(folder / ".downloads" / "journal")
        newer = dict(self._journaled())
        self._journal.records.clear()
        self.failed_before.difference_update(newer)
        found.update(newer)
        self._report_lost(folder, found.values())
        for url, outcome in found.items():
            if valid := self._under_spec(outcome):
                self.outcomes[url] = valid

    def _report_lost(self, folder: Path, outcomes: Iterable[Outcome]) -> None:
        images = {outcome.sha256 for outcome in outcomes if outcome.status == OK}
        lost = [sha256 for sha256 in images if self._length(sha256) is None]
        if lost:
            log.warning(
                "%s: %d images are in none of its shards any more; they are downloaded again", folder, len(lost)
            )

    def _under_spec(self, outcome: Outcome) -> Outcome | None:
        """Return an earlier outcome under the current spec; None if the URL must be downloaded to know."""
        if not all(map(self._allowed, outcome.hosts)):
            return None
        if not outcome.sha256:
            return outcome
        try:
            check_placeholder(outcome.image, self._spec["placeholders"])
        except PlaceholderError as error:
            return Outcome.of(outcome.image, MISSING, error.kind, str(error), outcome.hosts)
        length = self._length(outcome.sha256)
        if (
            length is None
            or length > self._spec["max_bytes"]
            or outcome.width * outcome.height > self._spec["max_pixels"]
        ):
            return None
        return Outcome.of(outcome.image, OK, hosts=outcome.hosts)

    def _known(self, path: Path) -> dict[str, Outcome]:
        try:
            path.open("rb").close()
        except OSError as error:
            raise file_error(path, error) from None
        try:
            facts = read_metadata(path)
            if not self._trusts(facts["private"]):
                return {}
            rows = read_table(path, _KNOWN).to_pylist()
        except (UserError, KeyError, TypeError) as error:
            log.warning("%s: damaged (%s); images are downloaded again", path, getattr(error, "reason", error))
            return {}
        # Under other settings a failure may become an image. The caller decides which failures are retried.
        return {
            row.pop("url"): Outcome(**{**row, "hosts": tuple(row["hosts"])})
            for row in rows
            if row["status"] != FAILED or facts["under"] == self._under
        }

    def _trusts(self, private: bool) -> bool:
        # Only whether private addresses were allowed is recorded, not the addresses themselves.
        return not private or bool(self._spec["private"])

    def _journaled(self) -> Iterator[tuple[str, Outcome]]:
        """Yield the outcomes in the journal that are still valid, in the order in which they were written."""
        for record in self._journal.records:
            fields = record.fields
            outcome = Outcome(**{**fields["outcome"], "hosts": tuple(fields["outcome"]["hosts"])})
            if record.length:
                self._downloaded[outcome.sha256] = record
            # The same settings fail on the same bytes; under others, or for a temporary reason, it is tried again.
            lasting = outcome.status != FAILED or (not outcome.passing and fields["under"] == self._under)
            if lasting and self._trusts(fields["private"]):
                yield fields["url"], outcome

    def add(self, url: str, outcome: Outcome, data: bytes = b"") -> None:
        """Record the outcome of a URL; `data` are the bytes of an outcome that is ok.

        Raises:
            UserError: it cannot be written, for example because the disk is full.
        """
        with self._lock:
            if outcome.status != OK or self._length(outcome.sha256) is not None:
                data = b""
            private = self._spec["private"]
            fields = {"url": url, "under": self._under, "private": private, "outcome": asdict(outcome)}
            record = self._journal.append(fields, data)
            if data:
                self._downloaded[outcome.sha256] = record
            self.outcomes[url] = outcome

    def _length(self, sha256: str) -> int | None:
        """Return the number of bytes of an image, None if it is not on disk."""
        if sha256 in self._stored:
            return self._stored.length(sha256)
        record = self._downloaded.get(sha256)
        return record.length if record else None

    def read(self, sha256: str) -> bytes:
        """Return the bytes, checked, of an image that is in no shard yet.

        Raises:
            UserError: they have changed since they were written.
        """
        record = self._downloaded[sha256]
        data = self._journal.read(record.start, record.length)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(
                f"{self._journal.path}: an image in it changed while the stage ran; run the same command again"
            )
        return data

    def write_known(self, path: Path, urls: Iterable[str]) -> None:
        """Write the outcomes of `urls`, for later runs."""
        rows = [{"url": url, **asdict(self.outcomes[url])} for url in dict.fromkeys(urls) if url in self.outcomes]
        columns = {field.name: pa.array([row[field.name] for row in rows], field.type) for field in _KNOWN}
        write_table(path, pa.table(columns), _KNOWN, {"private": self._spec["private"], "under": self._under})

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()
