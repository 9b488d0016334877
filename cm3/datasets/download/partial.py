"""Partial download on disk: received bytes and a note of their source, which a later process resumes from."""

import contextlib
import errno
import hashlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from cm3.common.errors import UserError
from cm3.common.files import lock, read_json, remove_stale_parts, write_json
from cm3.common.http import without_secrets

log = logging.getLogger("cm3.datasets.download.stage")

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Partial:
    """The hidden file `.{name}.partial` next to the target, and `.{name}.partial.json` with its source.

    A context manager that locks the file; other processes wait. On exit, resumable bytes are kept unless they were
    published or discarded; everything else is removed.

    Attributes:
        url: the mirror that the bytes come from, without secrets; empty if there are none.
        validator: ETag or Last-Modified of the mirror's version of the file; None without a usable one.
        total: bytes of the complete file; None if the mirror did not say.
        length: number of received bytes.
        digest: their sha256.
        resumed: whether they came in more than one response.
    """

    def __init__(self, file: Path, checked: bool) -> None:
        """Take the target; `checked`: its sha256 is known, so a part of another file would be noticed."""
        self.file, self.checked = file, checked
        self.path = file.with_name(f".{file.name}.partial")
        self._note_path = file.with_name(f".{file.name}.partial.json")
        self._published = False
        self._forget()

    def _forget(self) -> None:
        self.url = ""
        self.validator: str | None = None
        self.total: int | None = None
        self.length, self.digest, self.resumed = 0, hashlib.sha256(), False

    @property
    def resumable(self) -> bool:
        """Whether it can be verified that the rest of the file belongs to the received bytes."""
        return self.length > 0 and (self.validator is not None or self.checked)

    def __enter__(self) -> Self:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._bytes = _open_locked(self.path)
        remove_stale_parts(self._note_path)
        self._load()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._published and not self.resumable:
            self.discard()
            self.path.unlink(missing_ok=True)
        self._bytes.close()

    def _load(self) -> None:
        try:
            note = read_json(self._note_path)
            url, validator, total = note["url"], note["validator"], note["total"]
        except (UserError, KeyError, TypeError):
            url, validator, total = "", None, None
        length = os.fstat(self._bytes.fileno()).st_size
        valid = isinstance(url, str) and isinstance(validator, str | None) and isinstance(total, int | None)
        if not valid or not url or length > (length if total is None else total):
            self.discard()
            return
        self.url, self.validator, self.total, self.length = without_secrets(url), validator, total, length
        if not self.resumable:
            self.discard()
            return
        self.resumed = True
        self._bytes.seek(0)
        while block := self._bytes.read(1 << 20):
            self.digest.update(block)

    def restart(self, url: str, validator: str | None, total: int | None) -> None:
        """Drop the received bytes, and note the version of the file that the next ones belong to.

        Args:
            url: the mirror, without secrets.
            validator, total: see the attributes.
        """
        # In this order, a note never describes earlier bytes, wherever the process is killed.
        self._bytes.truncate(0)
        self._forget()
        write_json(self._note_path, {"url": url, "validator": validator, "total": total})
        self.url, self.validator, self.total = url, validator, total

    def append(self, block: bytes) -> None:
        """Write the next bytes. They are kept if the process is killed afterwards.

        Raises:
            UserError: the disk is full.
        """
        rest = memoryview(block)
        with self._full_disk_reported():
            while rest:
                rest = rest[self._bytes.write(rest) :]
        self.digest.update(block)
        self.length += len(block)

    def discard(self) -> None:
        """Drop the received bytes."""
        self._bytes.truncate(0)
        self._note_path.unlink(missing_ok=True)
        self._forget()

    def publish(self) -> None:
        """Move the complete file to its target, synced to disk.

        Raises:
            UserError: the disk is full.
        """
        with self._full_disk_reported():
            os.fsync(self._bytes.fileno())
        self.path.replace(self.file)
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._published = True
        self._note_path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _full_disk_reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            kept = f"{self.progress()} are kept in {self.path}" if self.resumable else "Nothing half-written was kept"
            raise UserError(
                f"{self.file}: {os.strerror(error.errno).lower()}. {kept}; make room and run the same command again"
            ) from error

    def progress(self) -> str:
        """Return the received and total megabytes as text."""
        total = "" if self.total is None else f" of {self.total / 1e6:.1f} MB"
        return f"{self.length / 1e6:.1f} MB{total}"

    def matches(self, headers: Mapping[str, str], total: int | None) -> bool:
        """Return whether a response to a range request is of the same version of the file.

        Needed because some servers honour Range and ignore If-Range.
        """
        if self.validator is not None:
            name = "ETag" if self.validator.startswith('"') else "Last-Modified"
            if headers.get(name, self.validator) != self.validator:
                return False
        return total is None or self.total is None or total == self.total


def _open_locked(path: Path) -> io.FileIO:
    while True:
        # Unbuffered: written bytes survive a kill, and a full disk is reported once.
        file = io.FileIO(path, "a+")
        try:
            if not lock(file, wait=False):
                log.warning("%s is being downloaded by another process; waiting for it to end", path)
                lock(file)
            if _is_still_at(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_still_at(file: io.FileIO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
