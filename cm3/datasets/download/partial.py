"""The bytes of a file that have arrived so far, kept where a killed download finds them again."""

import contextlib
import errno
import fcntl
import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from cm3.common.errors import UserError
from cm3.common.files import read_json, remove_stale_parts, write_json

log = logging.getLogger("cm3.datasets.download.stage")

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Partial:
    """The hidden file `.{name}.partial` beside the target, with `.{name}.partial.json` saying where it comes from.

    A context manager that one process holds at a time, others wait. On leaving, bytes that another try may build on
    stay, unless they were published or discarded; of anything else nothing is left.

    Attributes:
        url: the mirror, as configured, that the bytes come from; empty if there are none.
        validator: what identifies the mirror's version of the file, None if it gave nothing strong.
        total: bytes of the whole file, None if the mirror did not say.
        length: bytes that are here. digest: their sha256.
        resumed: whether they came in more than one answer.
    """

    def __init__(self, file: Path, checked: bool) -> None:
        """Take the target; `checked` says that its sha256 is known, so that no wrong piece can go unnoticed."""
        self.file, self.checked = file, checked
        self.path = file.with_name(f".{file.name}.partial")
        self._note = file.with_name(f".{file.name}.partial.json")
        self._published = False
        self._forget()

    def _forget(self) -> None:
        self.url = ""
        self.validator: str | None = None
        self.total: int | None = None
        self.length, self.digest, self.resumed = 0, hashlib.sha256(), False

    @property
    def resumable(self) -> bool:
        """Whether the rest of the file can be told to belong to the bytes that are here."""
        return self.length > 0 and (self.validator is not None or self.checked)

    def __enter__(self) -> Self:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._bytes = _open_alone(self.path)
        remove_stale_parts(self._note)
        self._recall()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._published and not self.resumable:
            self.discard()
            self.path.unlink(missing_ok=True)
        self._bytes.close()

    def _recall(self) -> None:
        try:
            note = read_json(self._note)
            url, validator, total = note["url"], note["validator"], note["total"]
        except (OSError, ValueError, KeyError, TypeError):
            url, validator, total = "", None, None
        length = os.fstat(self._bytes.fileno()).st_size
        sound = isinstance(url, str) and isinstance(validator, str | None) and isinstance(total, int | None)
        if not sound or not url or length > (length if total is None else total):
            self.discard()
            return
        self.url, self.validator, self.total, self.length = url, validator, total, length
        if not self.resumable:
            self.discard()
            return
        self.resumed = True
        self._bytes.seek(0)
        while block := self._bytes.read(1 << 20):
            self.digest.update(block)

    def restart(self, url: str, validator: str | None, total: int | None) -> None:
        """Drop what is here, for the first bytes of this version of the file."""
        # In this order: a note never describes bytes that came before it, wherever the process is killed.
        self._bytes.truncate(0)
        self._forget()
        write_json(self._note, {"url": url, "validator": validator, "total": total})
        self.url, self.validator, self.total = url, validator, total

    def append(self, block: bytes) -> None:
        """Write the next bytes; a process killed afterwards finds them again.

        Raises:
            UserError: the disk is full.
        """
        rest = memoryview(block)
        with self._room():
            while rest:
                rest = rest[self._bytes.write(rest) :]
        self.digest.update(block)
        self.length += len(block)

    def discard(self) -> None:
        """Drop what is here."""
        self._bytes.truncate(0)
        self._note.unlink(missing_ok=True)
        self._forget()

    def publish(self) -> None:
        """Make the bytes the target, which is then on the disk as a whole.

        Raises:
            UserError: the disk is full.
        """
        with self._room():
            os.fsync(self._bytes.fileno())
        self.path.replace(self.file)
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._published = True
        self._note.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            kept = f"{self.told()} are kept in {self.path}" if self.resumable else "Nothing half-written was kept"
            raise UserError(
                f"{self.file}: {os.strerror(error.errno).lower()}. {kept}; make room and run the same command again"
            ) from error

    def told(self) -> str:
        """Return how much is here, in words."""
        total = "" if self.total is None else f" of {self.total / 1e6:.1f} MB"
        return f"{self.length / 1e6:.1f} MB{total}"

    def fits(self, headers: Mapping[str, str], total: int | None) -> bool:
        """Return whether an answer to a request for the rest is about the version of the file that is here.

        A server may honour Range and ignore If-Range, so that its word alone is not enough.
        """
        if self.validator is not None:
            name = "ETag" if self.validator.startswith('"') else "Last-Modified"
            if headers.get(name, self.validator) != self.validator:
                return False
        return total is None or self.total is None or total == self.total


def validator_of(headers: Mapping[str, str]) -> str | None:
    """Return what identifies a version of a file byte for byte: a strong ETag, else a Last-Modified that is not fresh.

    A file may change twice within the second that Last-Modified resolves (RFC 9110, 8.8.2.2).
    """
    etag, modified = headers.get("ETag", ""), headers.get("Last-Modified", "")
    if re.fullmatch(r'"[^"]*"', etag):
        return etag
    try:
        age = parsedate_to_datetime(headers.get("Date", "")) - parsedate_to_datetime(modified)
    except (ValueError, TypeError):
        return None
    return modified if age >= timedelta(seconds=1) else None


def _open_alone(path: Path) -> io.FileIO:
    while True:
        # Unbuffered, so that what was written outlives the process, and a full disk is told of once.
        file = io.FileIO(path, "a+")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("%s is being fetched by another process; waiting for it to end", path)
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_same(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_same(file: io.FileIO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
