"""Paths as users type them."""

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
