"""Files that the user names in the configuration: whether they exist and can be read, and the parts of a table."""

from collections.abc import Mapping
from pathlib import Path

from cm3.common.errors import UserError

PARQUET = ".parquet"
"""Suffix of the parts of a Parquet table in a folder."""


def parts_of(path: Path) -> list[Path]:
    """Return the parts of a Parquet table that is a folder, in the order of their names; of anything else, `path` alone.

    Parts are the files *.parquet in the folder and in those below it; names that begin with a dot or an underscore are left
    out, as by the programs that write such folders.
    """
    if not path.is_dir():
        return [path]
    parts = (part for part in path.rglob(f"*{PARQUET}") if part.is_file())
    seen = [part for part in parts if not any(name[0] in "._" for name in part.relative_to(path).parts)]
    return sorted(seen) or [path]


def named_parts(name: str, path: Path) -> dict[str, str]:
    """Return the files of a table as inputs of a stage: {name: path}, and of a folder {name: .., name.1: .., name.2: ..}."""
    return {f"{name}.{number}" if number else name: str(part) for number, part in enumerate(parts_of(path))}


def parts_in(inputs: Mapping[str, Path], name: str) -> list[Path]:
    """Return the files of a table among the inputs of a stage, as `named_parts` named them."""
    further = sorted((key for key in inputs if key.startswith(f"{name}.")), key=lambda key: int(key.rpartition(".")[2]))
    return [inputs[key] for key in [name, *further] if key in inputs]


def contents_of(folder: Path, most: int = 5) -> str:
    """Return "the folder has a.csv, b.csv, ..." for a message, with the first names in a folder."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    more = ", ..." if len(names) > most else ""
    return f"the folder has {', '.join(names[:most])}{more}" if names else "the folder is empty"


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
            return f"is a folder, not a file; name a file, or of Parquet a folder with parts (*{PARQUET})"
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
