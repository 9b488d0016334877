"""Files that the user names in the configuration: whether they exist and can be read."""

from pathlib import Path

from cm3.common.errors import UserError


def check_readable(path: Path, key: str = "") -> None:
    """Raise a UserError unless `path` is a file that can be read.

    Args:
        path: the file.
        key: path of the key in the configuration that names it, such as datasets.shop.interactions.path.
    """
    reason = unreadable(path)
    if reason:
        raise UserError(f"{key} = {str(path)!r}: {reason}" if key else f"{path}: {reason}")


def unreadable(path: Path) -> str:
    """Return why `path` is not a file that can be read, and what to do; empty if it is one."""
    try:
        if path.is_dir():
            return "is a folder, not a file; name a file, and merge a table in parts into one file"
        if path.exists() and not path.is_file():
            return "is not a regular file; write its contents to a file"
        with path.open("rb"):
            return ""
    except FileNotFoundError:
        link = "a link to a file that does not exist" if path.is_symlink() else "no such file"
        return f"{link}; put it there or correct the path"
    except OSError as error:
        return f"cannot be read ({error.strerror or error}); check its permissions and those of its folders"
    except ValueError as error:  # a null byte in the path
        return f"is not a path ({error})"
