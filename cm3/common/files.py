"""Atomic writing of files, checksums and lock files."""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cm3.common.checksums import verified, with_checksum
from cm3.common.errors import DamagedFileError, UserError

log = logging.getLogger(__name__)

_NO_ROOM = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file too large",
}
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it is fsynced and renamed to `path`, else removed.

    Raises:
        UserError: the disk is full, or the folder or file cannot be written; `path` is unchanged.
    """
    target = Path(path)
    temporary, in_body = None, False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        in_body = True
        yield temporary
        in_body = False
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        # Other errors of the body are about other files.
        if error.errno in _NO_ROOM or not in_body or error.filename == str(temporary):
            raise file_error(target, error, "written") from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def file_error(path: str | os.PathLike[str], error: OSError, what: str = "read") -> UserError:
    """Return the error to raise where a file cannot be `what`: "read" or "written"."""
    if error.errno in _NO_ROOM:
        return UserError(
            f"{path}: {_NO_ROOM[error.errno]}. Nothing half-written was kept; "
            "make room and run the same command again, finished stages stay."
        )
    if isinstance(error, FileNotFoundError) and what == "read":
        return UserError(f"{path}: no such file")
    if isinstance(error, IsADirectoryError):
        return UserError(f"{path}: is a folder, but a file is expected here; move it away")
    place = f"{error.filename}: " if error.filename not in (None, path, str(path)) else ""
    return UserError(
        f"{path}: cannot be {what} ({place}{error.strerror or error}); check the permissions of the file and its folder"
    )


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of the system, such as a full disk, into a UserError about `path`, a file or folder being written."""
    try:
        yield
    except OSError as error:
        raise file_error(path, error, "written") from error


def remove_stale_parts(path: str | os.PathLike[str]) -> None:
    """Remove the temporary files that a killed writer of `path` left; call it while holding `exclusive`."""
    target = Path(path)
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: Any, checksum: bool = True) -> None:
    """Write `value` to `path` as indented JSON, atomically; an object gets a checksum. NaN is refused."""
    stored = with_checksum(value) if checksum and isinstance(value, dict) else value
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(stored, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the JSON value in `path`; the checksum of an object is compared and left out.

    Raises:
        DamagedFileError: not JSON, or the checksum is not that of the object; it was edited, or the file is damaged.
        UserError: absent or without permission.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise file_error(path, error) from None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(path, f"not JSON: {error}") from None
    return verified(path, value) if isinstance(value, dict) else value


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock file `path` while the body runs; the kernel releases it even when the holder is killed.

    A job that outlives its killed Snakemake (an orphan) is waited for, so two writers never meet. Where the file system
    has no locks, the body runs without one, after a warning.
    """
    target = Path(path)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        opened = target.open("a")
    with opened as handle:
        if not lock(handle, wait=False):
            log.warning("%s is held by another process; waiting for it to end", target)
            lock(handle)
        yield


def lock(file: IO[Any], wait: bool = True) -> bool:
    """Lock an open file until it is closed, and return whether this process may go on.

    On a file system without locks (some NFS, FUSE and cluster mounts) it may, after a warning.

    Args:
        file: the lock file.
        wait: wait while another process holds the lock; else return False.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn_of_no_locks(str(Path(file.name).parent), str(error.strerror))
    return True


@functools.cache
def _warn_of_no_locks(folder: str, reason: str) -> None:
    log.warning(
        "%s: files cannot be locked here (%s); going on without a lock: start one run at a time", folder, reason
    )
