"""Outcomes by URL: from this run's journal, and from the shards of earlier runs.

While the stage runs, `images/.downloads/journal` grows by one record per URL. When it is done, the journal is deleted,
`images/.known.parquet` holds the outcome of each URL, and the bytes are in the shards.

Disk space: the downloaded bytes are stored twice until the stage is done (journal and shards), and three times in a
rerun, where the earlier shards stay until the new ones are complete.
"""

import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cm3.common.checksums import check_parquet
from cm3.common.errors import DamagedFileError, UserError
from cm3.common.files import file_error
from cm3.common.images import memory_for
from cm3.common.tables import FAILED, IMAGES, MISSING, OK, read_metadata, read_table, reading_parquet, write_table
from cm3.datasets.images.journal import Journal
from cm3.datasets.images.shards import KNOWN
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


@dataclass(frozen=True, slots=True)
class _Place:
    """Location of an image: in the journal (group -1; start in bytes) or in a row group of a shard (start is the row)."""

    path: Path
    group: int
    start: int
    length: int


class Store:
    """Outcomes by URL, and the bytes of those that are ok. `add` may be called from any thread.

    Attributes:
        outcomes: known outcomes; delete one, and its URL is downloaded again.
        failed_before: URLs that failed in an earlier, finished run.
    """

    def __init__(self, folder: Path, spec: dict[str, Any], allowed: Callable[[str], bool]) -> None:
        """Read the outcomes of earlier runs in `folder`, checking every image's sha256.

        Args:
            folder: of the manifest and the shards.
            spec: only outcomes that hold under it are kept.
            allowed: whether a host may be contacted.
        """
        self.outcomes: dict[str, Outcome] = {}
        self._spec, self._allowed = spec, allowed
        self._under = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
        self._places: dict[str, _Place] = {}
        self._lock = threading.Lock()
        self._group: tuple[tuple[Path, int], Any] | None = None
        found: dict[str, Outcome] = {}
        self.failed_before: set[str] = set()
        if (folder / KNOWN).exists():
            found.update(self._known(folder / KNOWN))
            self.failed_before.update(url for url, outcome in found.items() if outcome.status == FAILED)
            for path in sorted(folder.glob("shard-*.parquet")):
                self._index_shard(path)
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
        lost = {outcome.sha256 for outcome in outcomes if outcome.status == OK}.difference(self._places)
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
        place = self._places.get(outcome.sha256)
        if (
            place is None
            or place.length > self._spec["max_bytes"]
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

    def _index_shard(self, path: Path) -> None:
        damaged = 0
        try:
            with memory_for(path), reading_parquet(path):
                check_parquet(path)
                # Without the checksums of pages: each image has its own, and one damaged page leaves the others whole.
                with pq.ParquetFile(path) as file:
                    for group in range(file.num_row_groups):
                        damaged += self._index_group(path, file, group)
        except DamagedFileError as error:
            log.warning("%s: damaged (%s); its images are downloaded again", path, error.reason)
        if damaged:
            log.warning(
                "%s: damaged (%d images are not those that were stored); they are downloaded again", path, damaged
            )

    def _index_group(self, path: Path, file: pq.ParquetFile, group: int) -> int:
        """Note the places of the images in a row group; return the number of damaged ones."""
        rows: int = file.metadata.row_group(group).num_rows
        whole = 0
        with contextlib.suppress(DamagedFileError), memory_for(path), reading_parquet(path):
            table = file.read_row_group(group, columns=IMAGES.names)
            for row, (digest, data) in enumerate(zip(table.column("sha256"), table.column("bytes"), strict=True)):
                content = data.as_buffer()
                if content is not None and hashlib.sha256(content).hexdigest() == digest.as_py():
                    self._places[digest.as_py()] = _Place(path, group, row, content.size)
                    whole += 1
        return rows - whole

    def _journaled(self) -> Iterator[tuple[str, Outcome]]:
        """Yield the outcomes in the journal that are still valid, in the order in which they were written."""
        for record in self._journal.records:
            fields = record.fields
            outcome = Outcome(**{**fields["outcome"], "hosts": tuple(fields["outcome"]["hosts"])})
            if record.length:
                self._places[outcome.sha256] = _Place(self._journal.path, -1, record.start, record.length)
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
            if outcome.status != OK or outcome.sha256 in self._places:
                data = b""
            private = self._spec["private"]
            fields = {"url": url, "under": self._under, "private": private, "outcome": asdict(outcome)}
            record = self._journal.append(fields, data)
            if data:
                self._places[outcome.sha256] = _Place(self._journal.path, -1, record.start, record.length)
            self.outcomes[url] = outcome

    def read(self, sha256: str) -> bytes:
        """Return an image's bytes, checked.

        Raises:
            UserError: they have changed since they were written.
        """
        place = self._places[sha256]
        if place.group < 0:
            data = self._journal.read(place.start, place.length)
        else:
            at = (place.path, place.group)
            if self._group is None or self._group[0] != at:
                with memory_for(place.path), reading_parquet(place.path), pq.ParquetFile(place.path) as file:
                    self._group = (at, file.read_row_group(place.group, columns=["bytes"]).column("bytes"))
            data = self._group[1][place.start].as_py()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"{place.path}: an image in it changed while the stage ran; run the same command again")
        return data

    def write_known(self, path: Path, urls: Iterable[str]) -> None:
        """Write the outcomes of `urls`, for later runs."""
        rows = [{"url": url, **asdict(self.outcomes[url])} for url in dict.fromkeys(urls) if url in self.outcomes]
        columns = {field.name: pa.array([row[field.name] for row in rows], field.type) for field in _KNOWN}
        write_table(path, pa.table(columns), _KNOWN, {"private": self._spec["private"], "under": self._under})

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()
