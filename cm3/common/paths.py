"""Paths as users type them, and checks that a file can be at a path."""

import os
import re
from pathlib import Path

from cm3.common.errors import UserError


def expand(path: str) -> str:
    """Return `path` with `~` and environment variables put in.

    Raises:
        UserError: a variable is not set.
    """
    expanded = os.path.expandvars(str(Path(path).expanduser()))
    unset = re.search(r"\$\w+|\$\{\w+\}", expanded)
    if unset:
        raise UserError(f"{path}: the environment variable {unset[0]} is not set")
    return expanded


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise UserError if `path` cannot be a folder: it is a file or a link to nothing, or below one."""
    check_kind(Path(path, "-"))


def check_kind(path: str | os.PathLike[str]) -> None:
    """Raise UserError if a file cannot be at `path`: a folder, a link to nothing, or below a file or such a link."""
    target = Path(path)
    for place in (*reversed(target.parents), target):
        if place.is_symlink() and not place.exists():
            raise UserError(
                f"{place}: is a link to {place.readlink()}, which does not exist; correct or remove the link"
            )
        if place.exists() and place.is_dir() == (place == target):
            kinds = ("a folder in the place of a file", "a file in the place of a folder")
            raise UserError(f"{place}: is {kinds[place != target]}; move it away")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise UserError if a file that does not exist yet cannot be at `path`, or its folder cannot be written to."""
    check_kind(path)
    folder = next(folder for folder in Path(path).parents if folder.exists())
    if not Path(path).exists() and not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: no permission to write {path}; correct the permissions of the folder")
