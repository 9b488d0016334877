"""What is known of URLs: fetched by this run (a journal), or by earlier ones (their shards).

`images/.downloads/journal` grows by one record a URL: a line of JSON with its checksum, then the image's bytes. It
is not synced to disk. Instead a record counts only when its checksum and the image's sha256 hold, so that neither a
kill nor a power cut leaves anything that could be mistaken for an image. It goes when the stage is done, and
`images/.known.parquet` tells what became of each URL; the bytes are in the shards.

Disk: while the stage runs, up to the fetched bytes once more than the shards, and another time in a rerun, in which
the earlier shards stay until the new ones are whole.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cm3.common.errors import UserError
from cm3.common.tables import FAILED, MISSING, OK, read_metadata, read_table, write_table
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
_LONGEST_LINE = 1 << 18


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one URL.

    Attributes:
        status, kind, reason: as in Found.
        sha256, width, height, format: of the bytes, where they are an image; a placeholder is missing and has them.
        hosts: those that it led on to.
        passing: failed in a way that may be over soon: not to be believed by another process.
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
        """Return the outcome of a URL that gave an image."""
        return cls(status, kind, reason, image.sha256, image.width, image.height, image.format, hosts)

    @property
    def image(self) -> ImageFacts:
        """What the bytes are."""
        return ImageFacts(self.sha256, self.width, self.height, self.format)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an image's bytes are: in the journal (group -1; start in bytes) or in a row group of a shard."""

    path: Path
    group: int
    start: int
    length: int


class Store:
    """Outcomes by URL, and the bytes of those that are ok. `add` may be called from any thread.

    Attributes:
        outcomes: what is known; delete one, and it is known no more.
        failed_before: URLs that failed in an earlier run, one that was done.
    """

    def __init__(self, folder: Path, spec: dict[str, Any], allowed: Callable[[str], bool]) -> None:
        """Read what earlier runs left in `folder`, checking every image's sha256.

        Only what this spec would find as well is taken over; `allowed` tells which hosts may be asked.
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
        self._path = folder / ".downloads" / "journal"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        newer = dict(self._replay())
        self.failed_before.difference_update(newer)
        found.update(newer)
        for url, outcome in found.items():
            if holds := self._judge(outcome):
                self.outcomes[url] = holds
        self._file = self._path.open("ab")
        self._end = self._path.stat().st_size
        self._reader = os.open(self._path, os.O_RDONLY)

    def _judge(self, outcome: Outcome) -> Outcome | None:
        """Return what the spec makes of an earlier outcome, None where only the server can tell."""
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
            facts = read_metadata(path)
            if not self._trusts(facts["private"]):
                return {}
            rows = read_table(path, _KNOWN).to_pylist()
        except (OSError, ValueError, KeyError, UserError) as error:  # pa.ArrowInvalid is a ValueError
            log.warning("%s cannot be read (%s); images are fetched again", path, error)
            return {}
        # Other settings may make a failure an image; of those that hold still, the caller says what is asked again.
        return {
            row.pop("url"): Outcome(**{**row, "hosts": tuple(row["hosts"])})
            for row in rows
            if row["status"] != FAILED or facts["under"] == self._under
        }

    def _trusts(self, private: bool) -> bool:
        # Which addresses images came from is not noted, only whether private ones were allowed.
        return not private or bool(self._spec["private"])

    def _index_shard(self, path: Path) -> None:
        try:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group)
                    digests, values = table.column("sha256"), table.column("bytes")
                    for row in range(len(table)):
                        digest, data = digests[row].as_py(), values[row].as_buffer()
                        if hashlib.sha256(data).hexdigest() == digest:
                            self._places[digest] = _Place(path, group, row, data.size)
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s cannot be read (%s); its images are fetched again", path, error)

    def _replay(self) -> Iterator[tuple[str, Outcome]]:
        """Yield what the journal's whole records say, and cut off what follows them."""
        if not self._path.exists():
            return
        good = 0
        with self._path.open("rb") as file:
            while (record := _read_record(file)) is not None:
                note, start, good = record["outcome"], record["start"], file.tell()
                note["hosts"] = tuple(note["hosts"])
                outcome = Outcome(**note)
                if record["length"]:
                    self._places[outcome.sha256] = _Place(self._path, -1, start, record["length"])
                # The same settings fail on the same bytes; under others, or another day, it is asked again.
                lasts = outcome.status != FAILED or (not outcome.passing and record["under"] == self._under)
                if lasts and self._trusts(record["private"]):
                    yield record["url"], outcome
        os.truncate(self._path, good)

    def add(self, url: str, outcome: Outcome, data: bytes = b"") -> None:
        """Note what became of a URL; `data` are the bytes of an outcome that is ok.

        Raises:
            UserError: it cannot be written, because the disk is full or worse.
        """
        with self._lock:
            if outcome.status != OK or outcome.sha256 in self._places:
                data = b""
            body = {
                "url": url,
                "under": self._under,
                "private": self._spec["private"],
                "length": len(data),
                "outcome": asdict(outcome),
            }
            line = json.dumps(body).encode()
            head = b"%08x " % zlib.crc32(line) + line + b"\n"
            try:
                self._file.write(head + data + b"\n")
                self._file.flush()
            except OSError as error:
                more = "; make room and" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ":"
                raise UserError(
                    f"{self._path}: {error.strerror or error}{more} run the same command again, what was fetched stays"
                ) from error
            if data:
                self._places[outcome.sha256] = _Place(self._path, -1, self._end + len(head), len(data))
            self._end += len(head) + len(data) + 1
            self.outcomes[url] = outcome

    def read(self, sha256: str) -> bytes:
        """Return an image's bytes, checked.

        Raises:
            UserError: they changed since they were written.
        """
        place = self._places[sha256]
        if place.group < 0:
            data = os.pread(self._reader, place.length, place.start)
        else:
            at = (place.path, place.group)
            if self._group is None or self._group[0] != at:
                with pq.ParquetFile(place.path) as file:
                    self._group = (at, file.read_row_group(place.group, columns=["bytes"]).column("bytes"))
            data = self._group[1][place.start].as_py()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"{place.path}: an image in it changed while this ran; run the same command again")
        return data

    def write_known(self, path: Path, urls: Iterable[str]) -> None:
        """Write what became of `urls`, for another run."""
        rows = [{"url": url, **asdict(self.outcomes[url])} for url in dict.fromkeys(urls) if url in self.outcomes]
        columns = {field.name: pa.array([row[field.name] for row in rows], field.type) for field in _KNOWN}
        write_table(path, pa.table(columns), _KNOWN, {"private": self._spec["private"], "under": self._under})

    def close(self) -> None:
        """Close the journal."""
        with contextlib.suppress(OSError):  # a full disk, which `add` has reported
            self._file.close()
        os.close(self._reader)


def _read_record(file: Any) -> dict[str, Any] | None:
    """Return the next record of a journal if it is complete, and the offset of its bytes; the file is positioned after it."""
    line = file.readline(_LONGEST_LINE)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if line.endswith(b"\n") and int(line[:8], 16) == zlib.crc32(line[9:-1]):
            record: dict[str, Any] = json.loads(line[9:])
            start, length = file.tell(), record["length"]
            data = file.read(length + 1)
            if len(data) == length + 1 and data.endswith(b"\n"):
                if length and hashlib.sha256(data[:-1]).hexdigest() != record["outcome"]["sha256"]:
                    return None
                return {**record, "start": start}
    return None
