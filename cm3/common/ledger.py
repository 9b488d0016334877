"""Ledger of files: the sha256 of each file that the workflow reads or writes, and what a file of the workflow was made for.

The ledger holds one JSON file for each path, in the folder of the data, so that it moves with them. A file is read for its
sha256 once: while its size, modification time and inode are those of the entry, the entry is believed.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cm3.common.errors import UserError
from cm3.common.files import read_json, sha256_of, write_json

FOLDER = Path("processed/.checksums")
_RECENT_NS = 1_000_000_000


@dataclass(frozen=True)
class Entry:
    """What the ledger knows of one file.

    Attributes:
        path: as the workflow names the file.
        size: bytes.
        mtime_ns, inode: of the file when its sha256 was taken.
        sha256: 64 hex digits.
        identity: settings and version that the file was made for; empty for a file of the user.
        outputs: the declared outputs of the job that made the file; it is one of them or a part of one.
        inputs: sha256 of the inputs of that job by path.
        damaged: why a reader refused the file; empty if none did.
    """

    path: str
    size: int
    mtime_ns: int
    inode: int
    sha256: str
    identity: str = ""
    outputs: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    damaged: str = ""

    def describes(self, status: os.stat_result) -> bool:
        """Return whether size, modification time and inode are those of the entry."""
        return (self.size, self.mtime_ns, self.inode) == (status.st_size, status.st_mtime_ns, status.st_ino)


class Ledger:
    """The entries below one folder."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        self._known: dict[str, Entry] = {}

    def entry(self, path: str | os.PathLike[str]) -> Entry | None:
        """Return the entry of a path, None if there is none or it is unreadable."""
        return self._read(self._file(path))

    def entries(self) -> Iterator[Entry]:
        """Yield all entries that are readable."""
        if not self.folder.is_dir():
            return
        for file in sorted(self.folder.glob("*.json")):
            entry = self._read(file)
            if entry:
                yield entry

    def sha256(self, path: str | os.PathLike[str]) -> str:
        """Return the sha256 of a file: that of its entry, or of its bytes where they are new or may have changed.

        Raises:
            OSError: the file cannot be read.
        """
        name = str(path)
        status = Path(path).stat()
        known = self._known.get(name)
        if not (known and known.describes(status)):
            known = self.entry(path)
        if not (known and known.describes(status)):
            known = self._renewed(name, known)
        self._known[name] = known
        return known.sha256

    def unchanged(self, entry: Entry) -> bool:
        """Return whether the file of an entry still holds the bytes that it was made with, and no reader refused it.

        A file of the same bytes, whatever its times, is taken as unchanged and as not damaged.
        """
        path = Path(entry.path)
        try:
            if entry.describes(path.stat()):
                return not entry.damaged
            if sha256_of(path) != entry.sha256:
                return False
            self._write(_restamped(entry, path.stat()))
        except OSError:
            return False
        return True

    def record(
        self,
        path: str | os.PathLike[str],
        identity: str,
        outputs: tuple[str, ...] = (),
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        """Write the entry of a file that the workflow has just made, or has checked and kept as a part of its outputs.

        A file that an earlier entry describes is not read.
        """
        before, known = Path(path).stat(), self.entry(path)
        kept = known is not None and known.describes(before) and not known.damaged
        digest = known.sha256 if known and kept else sha256_of(path)
        self._write(_entry(str(path), before, digest, identity, outputs, dict(inputs or {})))

    def forget_others(self, outputs: tuple[str, ...], files: Collection[str]) -> None:
        """Remove the entries of files that an earlier job of the same outputs made, and that are not among `files`."""
        for entry in self.entries():
            if entry.outputs == outputs and entry.path not in files:
                self.forget(entry.path)

    def mark_damaged(self, path: str | os.PathLike[str], reason: str) -> bool:
        """Note that a reader refused a file, and return whether the workflow can make the file again."""
        entry = self.entry(path)
        if entry is None or not entry.identity:
            return False
        with contextlib.suppress(OSError):
            entry = _restamped(entry, Path(path).stat())
        self._write(Entry(**(asdict(entry) | {"damaged": reason})))
        return True

    @contextlib.contextmanager
    def touching(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Keep the entry of a file that the body gives another time, so that its bytes are not read again."""
        file, entry = Path(path), self.entry(path)
        described = entry is not None and file.is_file() and entry.describes(file.stat())
        yield
        if entry is not None and described:
            status = file.stat()
            touched = Entry(**(asdict(entry) | {"mtime_ns": status.st_mtime_ns, "inode": status.st_ino}))
            self._write(touched)
            self._known[str(path)] = touched

    def forget(self, path: str | os.PathLike[str]) -> None:
        """Remove the entry of a path."""
        self._known.pop(str(path), None)
        self._file(path).unlink(missing_ok=True)

    def _renewed(self, name: str, old: Entry | None) -> Entry:
        # A file of the user, or one whose bytes may have changed since the workflow made it.
        status = Path(name).stat()
        digest = sha256_of(name)
        if old and old.identity:
            # What the workflow made stays as it was recorded, so that a change of it is noticed.
            if digest == old.sha256 and not old.damaged:
                self._write(_restamped(old, status))
            return _entry(name, status, digest)
        entry = _entry(name, status, digest)
        if time.time_ns() - status.st_mtime_ns > _RECENT_NS:
            # A file that was written this second can change again without a new time.
            self._write(entry)
        return entry

    def _file(self, path: str | os.PathLike[str]) -> Path:
        return self.folder / (hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:32] + ".json")

    def _read(self, file: Path) -> Entry | None:
        try:
            value = read_json(file)
            return Entry(**(value | {"outputs": tuple(value["outputs"])}))
        except (UserError, TypeError, KeyError):
            return None  # absent, or cut by a power failure: the file is read again

    def _write(self, entry: Entry) -> None:
        # Where the folder is read-only, files are read again in the next run.
        with contextlib.suppress(UserError):
            write_json(self._file(entry.path), asdict(entry))


def _entry(
    name: str,
    status: os.stat_result,
    digest: str,
    identity: str = "",
    outputs: tuple[str, ...] = (),
    inputs: Mapping[str, str] | None = None,
) -> Entry:
    return Entry(name, status.st_size, status.st_mtime_ns, status.st_ino, digest, identity, outputs, inputs or {})


def _restamped(entry: Entry, status: os.stat_result) -> Entry:
    stamp: dict[str, Any] = {"mtime_ns": status.st_mtime_ns, "inode": status.st_ino, "damaged": ""}
    return Entry(**(asdict(entry) | stamp))
