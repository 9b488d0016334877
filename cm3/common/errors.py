"""Exceptions for errors that the user can fix."""

import errno
import os
from pathlib import Path


class UserError(Exception):
    """An error that the user can fix: the message names the file, row or key, the value, and the next step.

    A stage that raises it ends with exit status 1 and this message alone, without a traceback.
    """


class DamagedFileError(UserError):
    """A file of the pipeline is cut, altered or unreadable: its bytes are not those that a stage wrote.

    A stage that reads a damaged input of another stage marks it, and the next run makes it again. A stage that finds a
    damaged file of its own (a checkpoint, a finished shard, a cached vector) logs a warning and makes it again at once.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path = Path(path)
        self.reason = reason
        super().__init__(f"{path}: damaged ({reason}); delete it and run the same command again, which makes it anew")

    def __reduce__(self) -> tuple[type["DamagedFileError"], tuple[Path, str]]:
        """Let a process of a pool hand the error to the one that started it."""
        return type(self), (self.path, self.reason)


_MACHINE_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


def machine_fault(error: BaseException, what: str) -> UserError | None:
    """Return the error to raise if `error` is a fault of this machine and says nothing about the data; else None.

    Args:
        error: raised while `what` was being done.
        what: as in "decoding an image".
    """
    if not isinstance(error, MemoryError) and getattr(error, "errno", None) not in _MACHINE_ERRNOS:
        return None
    reason = str(error) or "out of memory"
    return UserError(
        f"{what} failed for a reason of this machine, not of the data: {reason}. Use fewer workers, or allow more memory "
        "or open files (ulimit -n), and run the same command again"
    )


_PATH_ERRORS = (PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_PATH_ERRNOS = frozenset(
    {errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
)


def path_fault(error: OSError) -> UserError | None:
    """Return the error to raise if `error` says what is wrong with a path, such as a missing permission; else None."""
    if error.filename is None or not (isinstance(error, _PATH_ERRORS) or error.errno in _PATH_ERRNOS):
        return None
    path = Path(os.fsdecode(error.filename2 or error.filename))
    reason = (error.strerror or str(error)).lower()
    if path.is_symlink() and not path.exists():
        reason = f"is a symbolic link to {path.readlink()}, which does not exist"
    elif isinstance(error, FileExistsError | NotADirectoryError) and path.is_file():
        reason = "is a file where a folder is expected"
    elif isinstance(error, IsADirectoryError):
        reason = "is a folder where a file is expected"
    return UserError(f"{path}: {reason}; correct this and run the same command again")
