"""Versions of the libraries behind an output, and how many rows each of them made."""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import metadata

log = logging.getLogger(__name__)

UNKNOWN = "not recorded"
"""Counted for outputs of releases that did not record versions."""


def installed_versions(libraries: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each distribution; those that are not installed are left out."""
    found = {}
    for library in libraries:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


class VersionCounts:
    """Rows by library version, over all files that an output is made of."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()

    def add(self, versions: Mapping[str, str] | None, rows: int) -> None:
        """Count `rows` rows made with `versions` (library -> version); None: not recorded."""
        names = [UNKNOWN] if versions is None else [f"{library} {version}" for library, version in versions.items()]
        self._rows.update(dict.fromkeys(names, rows))

    def rows(self) -> dict[str, int]:
        """Return the rows by library and version, such as {"transformers 5.23.0": 44}."""
        return dict(sorted((name, rows) for name, rows in self._rows.items() if rows))

    def several(self) -> list[str]:
        """Return the entries of `rows` that belong to libraries with more than one version."""
        libraries = Counter(name.rpartition(" ")[0] for name in self.rows())
        mixed = [name for name in self.rows() if libraries[name.rpartition(" ")[0]] > 1]
        return mixed or (list(self.rows()) if UNKNOWN in self.rows() and len(self.rows()) > 1 else [])
