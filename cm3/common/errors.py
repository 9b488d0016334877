"""The exception for errors that the user can fix."""

import errno


class UserError(Exception):
    """An error that the user can fix: the message names the file, row or key, the value, and the next step.

    A stage that raises it ends with exit status 1 and this message alone, without a traceback.
    """


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
